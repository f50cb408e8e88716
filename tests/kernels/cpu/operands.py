"""Operands for the core's tests, and their truth: `lobcq_fx.format`, and float64 products of what it decodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec, absmax_row_scale, decode, encode
from lobcq_fx.kernels.cpu.library import Core
from lobcq_fx.kernels.cpu.operands import KernelWeight, PackedOperand, Tables
from tests.format.cases import codebooks_of, int8

PRODUCT_TOLERANCE = 2e-6
"""Of the sum of the products' magnitudes: fp32 rounding of at most a few hundred partial sums (2**-24 each)."""


@dataclass(frozen=True)
class Weight:
    """One weight as the core and as the reference hold it."""

    tables: Tables
    kernel: KernelWeight
    encoded: Encoded


def packed(encoded: Encoded) -> PackedOperand:
    return PackedOperand(
        encoded.codes,
        encoded.selectors,
        encoded.scales.view(torch.uint8),
        encoded.tensor_scale,
        encoded.spec,
        encoded.columns,
    )


def codebooks(spec: FormatSpec, seed: int = 7) -> Tensor:
    return int8(codebooks_of(seed, spec.num_codebooks))


def weight(core: Core, spec: FormatSpec, rows: int, columns: int, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * 0.05
    encoded = encode(values, spec, codebooks(spec))
    return Weight(core.tables(codebooks(spec)), core.pack_weight(packed(encoded)), encoded)


def activation(rows: int, columns: int, seed: int = 1) -> Tensor:
    """Rows of magnitudes from 1e-3 to 1e3."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10 ** (6 * torch.rand(rows, 1, generator=generator) - 3)
    return torch.randn(rows, columns, generator=generator) * magnitude


def encode_rows(x: Tensor, spec: FormatSpec) -> Encoded:
    return encode(x, spec, codebooks(spec), absmax_row_scale(x))


def at_offset(x: Tensor, offset: int) -> Tensor:
    """A copy that starts `offset` bytes behind an address that 64 divides, whatever its elements' size."""
    if x.numel() == 0:
        return x
    memory = bytearray(x.nbytes + 64 + offset)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 64 + offset
    memory[start : start + x.nbytes] = bytes(x.contiguous().reshape(-1).view(torch.uint8).numpy())
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape)


def assert_product(out: Tensor, a: Tensor, w: Encoded, bias: Tensor | None = None) -> None:
    """`out` is `a @ decode(w).T + bias` to fp32 rounding, and to one rounding more where out is not fp32."""
    a64, w64 = a.double(), decode(w).double()
    b64 = torch.zeros(()) if bias is None else bias.double()
    expected = a64 @ w64.T + b64
    tolerance = PRODUCT_TOLERANCE * (a64.abs() @ w64.abs().T + b64.abs())
    if out.dtype != torch.float32:
        tolerance += torch.finfo(out.dtype).eps * expected.abs() + torch.finfo(out.dtype).tiny
    excess = (out.double() - expected).abs() - tolerance
    assert bool((excess <= 0).all()), f"off by {excess.max().item():.3g} at {int(excess.argmax())} of {list(out.shape)}"
