"""Linears of up to 16 rows against float64 products of what `lobcq_fx.format` decodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.triton import decode_gemm as module
from lobcq_fx.kernels.triton.decode_gemm import Epilogue, decode_gemm, num_splits
from tests.format.cases import ALL_SPECS
from tests.kernels.triton.operands import DEVICE, Weight, activation, assert_product, weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def product(x: Tensor, w: Weight, dtype: torch.dtype = torch.float32, **epilogue: Tensor) -> Tensor:
    tail = Epilogue(epilogue.pop("row_scales", None), w.scale, **epilogue)
    return decode_gemm(x.to(DEVICE), w.lines, w.codebooks, w.encoded.spec, w.encoded.shape[0], tail, dtype)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_format(spec: FormatSpec, dtype: torch.dtype) -> None:
    w, x = weight(spec, 37, 333), activation(3, 333).to(dtype)
    assert_product(product(x, w), x, w.encoded)


@pytest.mark.parametrize("rows", [1, 2, 9, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (16, 512), (50, 700)], ids=str)
def test_shapes(rows: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    w, x = weight(FormatSpec(8, 64), *shape), activation(rows, shape[1]).to(dtype)
    assert_product(product(x, w), x, w.encoded)


def test_fp32_activations_keep_all_their_bits() -> None:
    """Terms of 8 bits alone would be off by 2**-9, two of them by 2**-17."""
    w, x = weight(FormatSpec(8, 64), 16, 64), torch.zeros(1, 64)
    x[0, 5] = 1 + 2**-9 + 2**-17 + 2**-23
    assert_product(product(x, w), x, w.encoded)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_splits_of_k(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """Also more of them than evenly divide the steps."""
    w, x = weight(FormatSpec(8, 64), 37, 2900), activation(5, 2900)
    monkeypatch.setattr(module, "ENOUGH_PROGRAMS", 3 * splits)
    bias = torch.randn(37)
    out = product(x, w, bias=bias.to(DEVICE))
    assert_product(out, x, w.encoded, bias)
    assert torch.equal(out, product(x, w, bias=bias.to(DEVICE)))


@pytest.mark.parametrize(
    ("panels", "steps", "expected"), [(64, 8, 4), (256, 8, 1), (1, 100, 16), (1, 3, 2), (1, 1, 1), (2000, 50, 1)]
)
def test_number_of_splits(panels: int, steps: int, expected: int) -> None:
    assert num_splits(panels, steps) == expected


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, splits: int) -> None:
    """Row scales and bias before the rounding, the residual after it: the bits of the graph that is not fused."""
    monkeypatch.setattr(module, "ENOUGH_PROGRAMS", 2 * splits)
    w, x = weight(FormatSpec(8, 64), 20, 1200), activation(4, 1200).half()
    row_scales, bias = torch.rand(4, 1, device=DEVICE), torch.randn(20, device=DEVICE).to(dtype)
    residual = torch.randn(4, 20, device=DEVICE).to(dtype)
    scaled = product(x, w, dtype, row_scales=row_scales, bias=bias)
    assert_product(scaled, x.double() * row_scales.cpu(), w.encoded, bias)
    assert torch.equal(product(x, w, dtype, row_scales=row_scales, bias=bias, residual=residual), scaled + residual)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_row_disturbs_no_other(bad: float, dtype: torch.dtype) -> None:
    w, x = weight(FormatSpec(), 20, 300), activation(4, 300).to(dtype)
    clean = product(x, w)
    x[2, 123] = bad
    out = product(x, w)
    assert not bool(out[2].isfinite().any())
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


def test_rows_may_be_strided() -> None:
    w, x = weight(FormatSpec(), 20, 100), activation(3, 300)[:, 77:177]
    assert_product(product(x, w), x, w.encoded)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    w, x = weight(FormatSpec(8, 128), 33, 600), activation(16, 600).half()
    whole = product(x, w)
    for rows in (1, 2, 7):
        assert torch.equal(product(x[:rows], w), whole[:rows])
