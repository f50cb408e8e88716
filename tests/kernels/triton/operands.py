"""Operands for the kernels' tests, and where they live: on the CPU for the interpreter, else on the GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format import Encoded, FormatSpec, decode, encode
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


PRODUCT_TOLERANCE = 2e-6
"""Of the sum of the products' magnitudes: fp32 rounding of at most a few hundred partial sums (2**-24 each)."""


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


def assert_product(out: Tensor, a: Tensor, w: Encoded, bias: Tensor | None = None) -> None:
    """`out` is `a @ decode(w).T + bias` to fp32 rounding, and to one rounding more where out is not fp32."""
    out, a64, w64 = out.cpu(), a.cpu().double(), decode(w).double()
    b64 = torch.zeros(()) if bias is None else bias.cpu().double()
    expected = a64 @ w64.T + b64
    tolerance = PRODUCT_TOLERANCE * (a64.abs() @ w64.abs().T + b64.abs())
    if out.dtype != torch.float32:
        tolerance += torch.finfo(out.dtype).eps * expected.abs() + torch.finfo(out.dtype).tiny
    excess = (out.double() - expected).abs() - tolerance
    assert bool((excess <= 0).all()), f"off by {excess.max().item():.3g} at {int(excess.argmax())} of {list(out.shape)}"
