"""Linears of up to 16 rows against float64 products of what `lobcq_fx.format` decodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode
from lobcq_fx.kernels.triton import decode_gemm as module
from lobcq_fx.kernels.triton.decode_gemm import decode_gemm, num_splits
from lobcq_fx.kernels.triton.encode_operand import encode_operand
from lobcq_fx.kernels.triton.lookup import Lookup
from lobcq_fx.kernels.triton.operands import Activation, Epilogue
from tests.format.cases import ALL_SPECS
from tests.kernels.triton.operands import DEVICE, Weight, activation, assert_product, weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def multiply(a: Activation, w: Weight, dtype: torch.dtype = torch.float32, **epilogue: Tensor) -> Tensor:
    tail = Epilogue(w.scale, **epilogue)
    return decode_gemm(a, w.lines, w.codebooks, w.encoded.spec, w.encoded.shape[0], tail, dtype)


def product(x: Tensor, w: Weight, **options: Any) -> Tensor:
    """Of a float activation."""
    return multiply(Activation(x.to(DEVICE)), w, **options)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
def test_every_format_and_plan(spec: FormatSpec) -> None:
    """Encoded activations as integers and in fp16, and float ones in bf16."""
    w, x = weight(spec, 37, 333), activation(3, 333)
    expected = decode(encode(x, spec, w.encoded.codebooks, absmax_row_scale(x)))
    for integers in (True, False):
        a = encode_operand(x.to(DEVICE), Lookup.of(w.codebooks), spec, None, integers)
        assert_product(multiply(a, w), expected, w.encoded)
    half = x.bfloat16()
    assert_product(product(half, w), half, w.encoded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "shape"), [(1, (1, 1)), (16, (16, 512)), (9, (50, 700))], ids=str)
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
    a = Activation(x.to(DEVICE), row_scales=torch.rand(4, 1, device=DEVICE))
    bias, residual = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((20,), (4, 20)))
    scaled = multiply(a, w, dtype, bias=bias)
    assert a.row_scales is not None
    assert_product(scaled, x.double() * a.row_scales.cpu(), w.encoded, bias)
    assert torch.equal(multiply(a, w, dtype, bias=bias, residual=residual), scaled + residual)


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


@pytest.mark.parametrize("integers", [True, False])
def test_a_marked_row_gives_nan_and_disturbs_no_other(integers: bool) -> None:
    w, x = weight(FormatSpec(), 20, 300), activation(4, 300)
    lookup = Lookup.of(w.codebooks)
    clean = multiply(encode_operand(x.to(DEVICE), lookup, FormatSpec(), None, integers), w)
    x[2, 123] = torch.inf
    out = multiply(encode_operand(x.to(DEVICE), lookup, FormatSpec(), None, integers), w)
    assert bool(out[2].isnan().all())
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


def test_entries_in_small_arrays_are_refused() -> None:
    w = weight(FormatSpec(8, 16), 20, 64)
    with pytest.raises(ValueError, match="format 8x16 has arrays below 32: encode to scaled entries"):
        multiply(Activation(torch.zeros(3, 64, dtype=torch.int8, device=DEVICE)), w)
