"""Operands for the kernels' tests, and where they live: on the CPU for the interpreter, else on the GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec, encode
from lobcq_fx.kernels.triton.weight_layout import CudaWeightLayout, WeightTiles
from tests.format.cases import codebooks_of, int8

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def codebooks(spec: FormatSpec, seed: int = 7) -> Tensor:
    return int8(codebooks_of(seed, spec.num_codebooks)).to(DEVICE)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    one, other = (t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected))
    assert torch.equal(one, other), f"{int((one != other).sum())} of {one.numel()} bytes differ"


def assert_same_bytes(actual: tuple[Tensor, ...], expected: Encoded) -> None:
    """`actual` is (codes, selectors, scales, tensor_scale [M, 1])."""
    tensor_scale = expected.tensor_scale.expand(expected.shape[0], 1)
    for one, other in zip(actual, (expected.codes, expected.selectors, expected.scales, tensor_scale), strict=True):
        assert_same_bits(one, other)


@dataclass(frozen=True)
class Weight:
    """One weight as the kernels and as the reference hold it."""

    tiles: WeightTiles
    encoded: Encoded

    @property
    def codebooks(self) -> Tensor:
        return self.encoded.codebooks.to(DEVICE)

    @property
    def scale(self) -> Tensor:
        return self.encoded.tensor_scale.to(DEVICE)


def parts(encoded: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    return encoded.codes.to(DEVICE), encoded.selectors.to(DEVICE), encoded.scales.to(DEVICE)


def weight(
    spec: FormatSpec, rows: int, columns: int, values: Tensor | None = None, books: Tensor | None = None
) -> Weight:
    if values is None:
        values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05
    encoded = encode(values, spec, codebooks(spec).cpu() if books is None else books)
    prepacked = CudaWeightLayout().pack(parts(encoded), spec, columns)
    return Weight(WeightTiles.of(prepacked, spec, rows, columns), encoded)


def activation(rows: int, columns: int, seed: int = 1) -> Tensor:
    """Rows of magnitudes from 1e-3 to 1e3."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10 ** (6 * torch.rand(rows, 1, generator=generator) - 3)
    return torch.randn(rows, columns, generator=generator) * magnitude
