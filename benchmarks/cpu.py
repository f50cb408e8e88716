"""The CPU core against other linears: `python benchmarks/cpu.py --library liblobcq.so [--output cpu.json]`.

Every product is checked before it is timed. Then all contenders take turns, in an order that changes from round to
round, and each round gives one ratio to each peer; medians of those ratios are what is reported, so that a
machine that others use too slows both sides alike. Activation encoding is part of our time. Up to 8 rows the weight
is evicted from the caches before each call, as it is in a model larger than they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cpu_peers import PEERS, Linear
from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, universal_codebooks
from lobcq_fx.kernels.cpu.build import compile_core
from lobcq_fx.kernels.cpu.library import Core, KernelWeight, Tables, torch_parallel_for

SHAPES = ((2048, 2048), (4096, 4096), (11008, 4096), (4096, 11008))
"""N, K."""

FORMATS = ("8x64", "16x64", "8x128", "16x128")
ROWS = (1, 8, 64, 512)
COLD_ROWS = 8
EVICTION_BYTES = 128 << 20
READ = "plain read"
"""The contender that only reads as many bytes, by torch's vectorised sum: what share of that speed do we reach?"""

SETTLE_SECONDS = 0.003
"""Between calls, so that the last contender's worker threads stop spinning."""

EXACT = 1e-5
RESEMBLES = 0.25
"""Relative error in norm: fp32 rounding for our product of decoded operands; 4-bit weights for a peer's."""


@dataclass(frozen=True)
class Ours:
    """Our linear in one format: `run` encodes the activation and multiplies."""

    name: str
    core: Core
    tables: Tables
    weight: KernelWeight
    reference: Tensor

    def run(self, x: Tensor) -> Tensor:
        """The product of x [M, K]."""
        a = self.core.encode_activation(self.tables, x, self.weight.spec.array_size)
        return self.core.linear(self.tables, self.weight, a)

    def check(self, x: Tensor) -> None:
        """Exit unless the product of x is right."""
        spec = self.weight.spec
        books = universal_codebooks(spec.num_codebooks)
        encoded = decode(encode(x, spec, books, absmax_row_scale(x)))
        _require(self.name, self.run(x), encoded.double() @ self.reference.double().T, EXACT)


def make_ours(core: Core, weight: Tensor, name: str) -> Ours:
    """Encode and repack a weight; the reference is what its bytes decode to."""
    spec = FormatSpec.from_name(name)
    tables = core.tables(universal_codebooks(spec.num_codebooks))
    packed = core.encode(tables, weight, spec.array_size, core.tensor_scale(weight))
    return Ours(f"lobcq {name}", core, tables, core.pack_weight(packed), core.decode(tables, packed))


def _require(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((actual.double() - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise SystemExit(f"{name} is wrong (relative error {error:.3g}): no speed for it")


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def race(contenders: dict[str, Linear], x: Tensor, rounds: int, eviction: Tensor) -> dict[str, list[float]]:
    """Times of every contender in every round, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if x.shape[0] <= COLD_ROWS:
                eviction.add_(1)
            time.sleep(SETTLE_SECONDS)
            times[name].append(seconds(lambda run=contenders[name]: run(x)))  # type: ignore[misc]
    return times


def measure_shape(core: Core, shape: tuple[int, int], arguments: argparse.Namespace) -> Iterable[dict[str, object]]:
    """One result for each number of rows and format."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    ours = [make_ours(core, weight, name) for name in arguments.formats]
    peers = {name: make(weight, torch.get_num_threads()) for name, make in PEERS.items() if name in arguments.peers}
    eviction, plain = torch.zeros(EVICTION_BYTES // 4), torch.ones(ours[0].weight.data.numel() // 4)
    for rows in arguments.rows:
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
        sample = x[:16]
        for mine in ours:
            mine.check(sample)
        for name, run in peers.items():
            _require(name, run(sample), sample.double() @ weight.double().T, RESEMBLES)
        contenders = {mine.name: mine.run for mine in ours} | peers
        if rows == 1:
            contenders[READ] = lambda _x: plain.sum()
        rounds = arguments.rounds if rows > COLD_ROWS else 3 * arguments.rounds
        times = race(contenders, x, rounds, eviction)
        for mine in ours:
            own, size = times[mine.name], mine.weight.data.numel()
            share = [read / plain.nbytes * size / t for read, t in zip(times.get(READ, []), own, strict=False)]
            yield {
                "shape": shape,
                "rows": rows,
                "threads": torch.get_num_threads(),
                "format": mine.name.removeprefix("lobcq "),
                "seconds": statistics.median(own),
                "best_seconds": min(own),
                "bandwidth_share": statistics.median(share) if share else None,
                "ratios": {
                    name: statistics.median(p / o for p, o in zip(times[name], own, strict=True)) for name in peers
                },
            }


def measure_encoding(core: Core, rounds: int) -> dict[str, float]:
    """Nanoseconds a scalar of activation encoding and repacking, scalars a second of weight encoding; N_c = 8."""
    tables = core.tables(universal_codebooks(8))
    x = torch.randn(512, 4096)
    scale = core.tensor_scale(x)
    packed = core.encode(tables, x, 64, scale)
    activation = statistics.median(seconds(lambda: core.encode_activation(tables, x, 64)) for _ in range(rounds))
    load = statistics.median(seconds(lambda: core.load_activation(tables, packed)) for _ in range(rounds))
    weight = statistics.median(seconds(lambda: core.encode(tables, x, 64, scale)) for _ in range(rounds))
    repack = statistics.median(seconds(lambda: core.pack_weight(packed)) for _ in range(rounds))
    return {
        "activation_ns_per_scalar": activation / x.numel() * 1e9,
        "load_packed_activation_ns_per_scalar": load / x.numel() * 1e9,
        "weight_scalars_per_second": x.numel() / weight,
        "repack_scalars_per_second": x.numel() / repack,
    }


def describe(result: dict[str, object]) -> str:
    """One line of the printed table."""
    shape: tuple[int, int] = result["shape"]  # type: ignore[assignment]
    (n, k), rows = shape, int(result["rows"])  # type: ignore[call-overload]
    best = float(result["best_seconds"])  # type: ignore[arg-type]
    rate = f"{rows * n * k / best / 1e9:6.0f} GMAC/s"
    if rows == 1:
        rate = f"{float(result['bandwidth_share']) * 100:5.0f} % of BW"  # type: ignore[arg-type]
    ratios = "  ".join(f"{name} {ratio:5.2f}x" for name, ratio in result["ratios"].items())  # type: ignore[attr-defined]
    return (
        f"{n:6d} x {k:<6d} {result['format']:>6} M={rows:<4d} {float(result['seconds']) * 1e3:8.3f} ms {rate}  {ratios}"  # type: ignore[arg-type]
    )


def parse() -> argparse.Namespace:
    """Command line arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, help="the compiled core; compiled here if not given")
    parser.add_argument("--output", type=Path, help="JSON file for all results")
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES], metavar="NxK")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    """Command line."""
    arguments = parse()
    library = arguments.library or compile_core(Path("liblobcq.so").absolute())
    core = Core(library, torch_parallel_for())
    report: dict[str, object] = {"cpu": platform.processor() or platform.machine(), "isa": core.isa, "results": []}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        encoding = measure_encoding(core, arguments.rounds)
        load = os.getloadavg()[0]
        print(f"== {core.isa}, {threads} threads, load {load:.2f}")
        print("   " + ", ".join(f"{name} {value:.4g}" for name, value in encoding.items()))
        report[f"threads={threads}"] = encoding
        for text in arguments.shapes:
            n, k = (int(part) for part in text.split("x"))
            for result in measure_shape(core, (n, k), arguments):
                report["results"].append(result)  # type: ignore[attr-defined]
                print(describe(result), flush=True)
        report[f"load after {threads} threads"] = os.getloadavg()
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
