"""Linears on a GPU: ours of every format and mode, cuBLAS in bf16, and the 4-bit linears of others that are installed.

Each product is checked before anything is timed: ours against the format's, those of others against the float one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.timing import captured, race, summary
from lobcq_fx.benchmarking.contender import CHECKED_ROWS, WrongProductError
from lobcq_fx.benchmarking.peers import RESEMBLES
from lobcq_fx.benchmarking.race import Burst
from lobcq_fx.format import Encoded, FormatSpec, absmax_row_scale, decode, encode, universal_codebooks
from lobcq_fx.kernels.bind import weight_layout

CUBLAS = "bf16"
OURS = {"W4A4 8x64": ("8x64", "w4a4"), "W4A4 8x128": ("8x128", "w4a4"), "W4A16 8x64": ("8x64", "w4a16")}

COLD_BYTES = 256 << 20
"""What a burst of few rows walks through: several times the L2 cache, so that weights come from memory."""

OURS_TOLERANCE = 0.005
"""Relative error in norm of our product against the format's in fp32: bf16 rounds the result once, by 2**-9."""

Linear = Callable[[Tensor], Tensor]


def measure_linear(
    name: str, shape: tuple[int, int], rows: tuple[int, ...], rounds: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """One linear [N, K], bf16 activations: for each number of rows the times of all contenders, and what they move."""
    outputs, columns = shape
    generator = torch.Generator(device).manual_seed(outputs + columns)
    weight = (torch.randn(shape, generator=generator, device=device) * 0.02).bfloat16()
    samples = {m: torch.randn((m, columns), generator=generator, device=device).bfloat16() for m in rows}
    linears: dict[str, tuple[Linear, int]] = {CUBLAS: (cublas(weight), weight.nbytes)}
    not_run: dict[str, str] = {}
    for ours, (spec, mode) in OURS.items():
        linears[ours] = lobcq_linear(weight, FormatSpec.from_name(spec), mode, list(samples.values()))
    for peer, make in PEERS.items():
        try:
            linears[peer] = make(weight)
            for x in samples.values():
                check(peer, linears[peer][0](x), x.float() @ weight.float().t(), RESEMBLES)
                captured([partial(linears[peer][0], x)], device)
        except Exception as error:  # whatever a rival's package may raise is a reason, not our failure
            linears.pop(peer, None)
            not_run[peer] = f"{type(error).__name__}: {error}".splitlines()[0]
    for m, x in samples.items():
        bursts = {contender: copies(linear, size, x) for contender, (linear, size) in linears.items()}
        yield {
            "linear": name,
            "shape": list(shape),
            "rows": m,
            "bytes": weight.numel() * FormatSpec().bits_per_scalar / 8 + x.nbytes + 2 * m * outputs,
            "operations": 2 * m * outputs * columns,
            "times": summary(race(bursts, rounds, device), CUBLAS),
            "not_run": not_run,
        }


def cublas(weight: Tensor) -> Linear:
    """torch's own product."""
    return partial(_float_linear, weight)


def _float_linear(weight: Tensor, x: Tensor) -> Tensor:
    return nn.functional.linear(x, weight)


def lobcq_linear(weight: Tensor, spec: FormatSpec, mode: str, samples: list[Tensor]) -> tuple[Linear, int]:
    """Ours, checked on the first rows of each sample, and the bytes of its weight.

    Raises:
        WrongProductError: it differs from the format's product by more than its rounding.
        RuntimeError: the device has no kernels.
    """
    encoded = encoded_weight(weight, spec)
    packed, tables = in_kernel_layout(encoded)
    linear = _Prepacked(packed, encoded.tensor_scale, tables, weight.shape[0], spec.array_size, mode == "w4a4")
    decoded = decode(encoded)
    for x in samples:
        rows = x[:CHECKED_ROWS].float()
        seen = decode(encode(rows, spec, encoded.codebooks, absmax_row_scale(rows))) if mode == "w4a4" else rows
        check(f"{mode} {spec.name}", linear(x)[:CHECKED_ROWS], seen @ decoded.t(), OURS_TOLERANCE)
    return linear, packed.nbytes


def encoded_weight(weight: Tensor, spec: FormatSpec) -> Encoded:
    """A weight [N, K] in universal codebooks, where it is."""
    books = universal_codebooks(spec.num_codebooks).to(weight.device)
    parts = torch.ops.lobcq.quantize_weight(weight, books, spec.array_size)
    return Encoded(*parts, books, spec, weight.shape[1])


def in_kernel_layout(encoded: Encoded) -> tuple[Tensor, Tensor]:
    """The weight as its device's kernels read it, and their look-up tables.

    Raises:
        RuntimeError: the device has no kernels.
    """
    layout = weight_layout(encoded.codes.device)
    if layout is None:
        raise RuntimeError(f"no kernels for {encoded.codes.device}: set LOBCQ_TRITON=1")
    parts = (encoded.codes, encoded.selectors, encoded.scales)
    return layout.pack(parts, encoded.spec, encoded.columns), layout.tables(encoded.codebooks)


class _Prepacked:
    """The op that quantized models run, on one weight."""

    def __init__(self, packed: Tensor, scale: Tensor, tables: Tensor, outputs: int, array: int, encodes: bool) -> None:
        self.packed, self.scale, self.tables, self.encodes = packed, scale, tables, encodes
        self.rest = ([torch.empty(0, device=packed.device)], [outputs], array)

    def __call__(self, x: Tensor) -> Tensor:
        op, weight = torch.ops.lobcq.linear_prepacked, ([self.packed], [self.scale], self.tables)
        if self.encodes:
            (out,) = op.default(x, self.tables, None, *weight, *self.rest, x.dtype)
        else:
            (out,) = op.float_activation(x, *weight, *self.rest)
        return out


def torchao_int4(weight: Tensor) -> tuple[Linear, int]:
    """torchao's `Int4WeightOnlyConfig`, groups of 128."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = _module(weight)
    quantize_(model, Int4WeightOnlyConfig(group_size=128))
    return model, weight.numel() // 2


def torchao_codebook(weight: Tensor) -> tuple[Linear, int]:
    """torchao's prototype codebook format, on whose linear every call decodes the weight."""
    from torchao.prototype.quantization.codebook import CodebookWeightOnlyConfig
    from torchao.quantization import quantize_

    model = _module(weight)
    quantize_(model, CodebookWeightOnlyConfig())
    return model, weight.numel() // 2


def bitsandbytes_nf4(weight: Tensor) -> tuple[Linear, int]:
    """bitsandbytes' `Linear4bit`, NF4, bf16 arithmetic."""
    import bitsandbytes

    linear = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    linear.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    return linear.to(weight.device), weight.numel() // 2


_ALL_PEERS = {
    "torchao int4": ("torchao", torchao_int4),
    "torchao codebook": ("torchao", torchao_codebook),
    "bitsandbytes NF4": ("bitsandbytes", bitsandbytes_nf4),
}
PEERS: Mapping[str, Callable[[Tensor], tuple[Linear, int]]] = {
    name: make for name, (package, make) in _ALL_PEERS.items() if find_spec(package) is not None
}
"""Those whose package is installed."""


def _module(weight: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device))
    model[0].weight = nn.Parameter(weight.clone(), requires_grad=False)
    return model


def copies(linear: Linear, size: int, x: Tensor) -> Burst:
    """Calls on as many copies of a linear as few rows need to find no weight in the cache."""
    wanted = 1 if x.shape[0] > 16 else min(64, max(2, COLD_BYTES // max(1, size) + 1))
    if x.device.type == "cpu":
        wanted = 1
    return [partial(one, x) for one in _copied(linear, wanted)]


def _copied(linear: Linear, count: int) -> Iterator[Linear]:
    yield linear
    for _ in range(count - 1):
        yield copy.deepcopy(linear)


@torch.no_grad()
def check(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare by the relative error in norm.

    Raises:
        WrongProductError: it is larger than the tolerance, or not a number.
    """
    error = float((actual.float() - expected.float()).norm() / expected.float().norm())
    if not error <= tolerance:
        raise WrongProductError(f"{name}: relative error {error:.3g}, at most {tolerance:g} expected")
