"""The table-driven encoder against the broadcast it replaces: time and peak memory, results compared first.

    python -m benchmarks.cpu.encoder_speed

Both encode the same [512, 2048] fp32 weight (2**20 scalars, 4 MiB) on the CPU. The broadcast compares every scalar with
all N_c x 16 entries. Each runs in a process of its own, so that peak memory is its own (Linux only). Writes
benchmarks/results/encoder_speed.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, encode, universal_codebooks
from lobcq_fx.format.codes import to_grid
from lobcq_fx.format.encoded import Encoded
from lobcq_fx.format.packing import pack_codes, pack_selectors
from lobcq_fx.format.scales import absmax_tensor_scale, array_scales
from lobcq_fx.format.spec import BLOCK_SIZE, GRID

RESULT = Path(__file__).parents[1] / "results" / "encoder_speed.json"
SHAPE = (512, 2048)
REPEATS = 7


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows = []
    print("| format | encoder CPU ms | ns a scalar | broadcast CPU ms | ratio | encoder MiB | broadcast MiB |")
    print("|---|---|---|---|---|---|---|")
    for name in ("2x64", "8x64", "16x64"):
        check(FormatSpec.from_name(name))
        ours, naive = (measure(name, way, arguments.threads) for way in ("table", "broadcast"))
        row = {
            "format": name,
            "encoder_ms": round(ours["seconds"] * 1e3, 2),
            "encoder_ns_per_scalar": round(ours["seconds"] * 1e9 / (SHAPE[0] * SHAPE[1]), 2),
            "broadcast_ms": round(naive["seconds"] * 1e3, 1),
            "times_faster": round(naive["seconds"] / ours["seconds"], 1),
            "encoder_peak_mib": round(ours["peak_mib"], 1),
            "broadcast_peak_mib": round(naive["peak_mib"], 1),
        }
        rows.append(row)
        print(f"| {' | '.join(str(value) for value in row.values())} |")
    result = {
        "command": "python -m benchmarks.cpu.encoder_speed",
        "shape": SHAPE,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def broadcast_encode(x: Tensor, spec: FormatSpec, codebooks: Tensor) -> Encoded:
    """`format.encode` under the weight rule with every scalar compared to every entry of every codebook."""
    tensor_scale = absmax_tensor_scale(x)
    arrays = x.view(x.shape[0], -1, spec.array_size)
    scales = array_scales(arrays, tensor_scale)
    grid = to_grid(arrays, scales, tensor_scale).view(-1, BLOCK_SIZE)  # [blocks, 8]
    entries = codebooks.int() * GRID  # [N_c, 16]
    squared = (grid[:, None, :, None] - entries[None, :, None, :]).square()  # [blocks, N_c, 8, 16]
    least, nearest = squared.min(dim=-1)  # [blocks, N_c, 8]
    selectors = least.sum(dim=-1).argmin(dim=-1)
    codes = nearest.gather(1, selectors.view(-1, 1, 1).expand(-1, 1, BLOCK_SIZE)).view(x.shape).to(torch.uint8)
    packed = pack_selectors(selectors.view(x.shape[0], -1).to(torch.uint8), spec.selector_bits)
    return Encoded(pack_codes(codes), packed, scales, tensor_scale, codebooks, spec, x.shape[1])


def check(spec: FormatSpec) -> None:
    """Refuse to time encoders that differ.

    Raises:
        AssertionError: a byte differs.
    """
    x = operand()[:64]
    ours, naive = (way(x, spec, universal_codebooks(spec.num_codebooks)) for way in (encode, broadcast_encode))
    assert torch.equal(ours.codes, naive.codes), "codes differ"
    assert torch.equal(ours.selectors, naive.selectors), "selectors differ"
    assert torch.equal(ours.scales.view(torch.uint8), naive.scales.view(torch.uint8)), "scales differ"


def measure(name: str, way: str, threads: int) -> dict[str, Any]:
    """Best CPU time of several runs in a fresh process, and how far its memory rose above what stood before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (name, way, threads))


def operand() -> Tensor:
    """The weight to encode."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def _measure(name: str, way: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    spec, x = FormatSpec.from_name(name), operand()
    codebooks = universal_codebooks(spec.num_codebooks)
    encoder = encode if way == "table" else broadcast_encode
    encoder(x[:8], spec, codebooks)  # warm up
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls back to what is resident now
    before = _status_kib("VmHWM")
    times = []
    for _ in range(REPEATS if way == "table" else 2):
        start = time.process_time()
        encoder(x, spec, codebooks)
        times.append(time.process_time() - start)
    return {"seconds": min(times), "peak_mib": (_status_kib("VmHWM") - before) / 1024}


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
