"""Operands for the core's tests, and their truth: `lobcq_fx.format`, and float64 products of what it decodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec, absmax_row_scale, encode
from lobcq_fx.kernels.cpu.library import Core
from lobcq_fx.kernels.cpu.operands import KernelWeight, PackedOperand, Tables
from tests.format.cases import codebooks_of, int8


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
