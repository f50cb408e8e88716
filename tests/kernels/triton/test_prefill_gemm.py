"""Linears of many rows against float64 products of what `lobcq_fx.format` decodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, encode_int8
from lobcq_fx.kernels.triton.configs import PrefillConfig
from lobcq_fx.kernels.triton.encode_operand import encode_operand
from lobcq_fx.kernels.triton.lookup import Lookup
from lobcq_fx.kernels.triton.operands import Activation, Epilogue, Linear
from lobcq_fx.kernels.triton.prefill_gemm import prefill_gemm
from tests.format.cases import EVERY_SPEC
from tests.kernels.products import assert_product
from tests.kernels.triton.operands import DEVICE, Weight, activation, weight
from tests.sweeps import crossed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def product(a: Activation, w: Weight, dtype: torch.dtype = torch.float32, **epilogue: Tensor) -> Tensor:
    linear = Linear(w.tiles, w.encoded.shape[0], Epilogue(w.scale, **epilogue))
    return prefill_gemm(a, [linear], w.codebooks, w.encoded.spec, dtype)[0]


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=lambda s: s.name)
def test_every_format_and_plan(spec: FormatSpec) -> None:
    """Integer and fp16 plans, and float activations in bf16."""
    w, x = weight(spec, 20, 200), activation(3, 200)
    lookup = Lookup.of(w.codebooks)
    expected = decode(encode(x, spec, w.encoded.codebooks, absmax_row_scale(x)))
    for integers in (True, False):
        assert_product(product(encode_operand(x.to(DEVICE), lookup, spec, None, integers), w), expected, w.encoded)
        in_int8 = decode(encode_int8(x, spec.array_size))
        assert_product(product(encode_operand(x.to(DEVICE), None, spec, None, integers), w), in_int8, w.encoded)
    half = x.bfloat16()
    assert_product(product(Activation(half.to(DEVICE)), w), half, w.encoded)


@pytest.mark.parametrize(("dtype", "shape"), crossed(DTYPES, [(1, 1, 1), (130, 16, 100), (150, 140, 200)]))
def test_shapes(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Tiles left over in both directions, and groups of tiles that are not full."""
    rows, outputs, columns = shape
    w, x = weight(FormatSpec(8, 64), outputs, columns), activation(rows, columns).to(dtype)
    assert_product(product(Activation(x.to(DEVICE)), w), x, w.encoded)


@pytest.mark.parametrize(
    "config", [PrefillConfig(group=2), PrefillConfig(tile_m=64, tile_n=128, step_columns=128), PrefillConfig(tile_n=16)]
)
def test_configurations(config: PrefillConfig) -> None:
    """Also more tiles of rows than a group has."""
    w, x = weight(FormatSpec(8, 64), 140, 150), activation(330, 150).half()
    linear, a = Linear(w.tiles, 140, Epilogue(w.scale)), Activation(x.to(DEVICE))
    (out,) = prefill_gemm(a, [linear], w.codebooks, w.encoded.spec, torch.float32, config)
    assert_product(out, x, w.encoded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue(dtype: torch.dtype) -> None:
    """Row scales and bias before the rounding, the residual after it: the bits of the graph that is not fused."""
    w, x = weight(FormatSpec(8, 64), 20, 200), activation(18, 200).half()
    a = Activation(x.to(DEVICE), row_scales=torch.rand(18, 1, device=DEVICE))
    bias, residual = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((20,), (18, 20)))
    scaled = product(a, w, dtype, bias=bias)
    assert a.row_scales is not None
    assert_product(scaled, x.double() * a.row_scales.cpu(), w.encoded, bias)
    assert torch.equal(product(a, w, dtype, bias=bias, residual=residual), scaled + residual)
    assert torch.equal(product(a, w, dtype, residual=residual), product(a, w, dtype) + residual)


@pytest.mark.parametrize(("array_size", "sign"), crossed([32, 128], [1, -1]))
def test_extreme_entries_do_not_overflow(array_size: int, sign: int) -> None:
    """Every product is 31 * 31 and of one sign, with the largest scales."""
    spec = FormatSpec(2, array_size)
    books = torch.tensor([[-31] * 8 + [31] * 8] * 2, dtype=torch.int8)
    x, values = torch.full((2, 512), sign * 2.0), torch.full((20, 512), 0.3)
    values[1::2] *= -1
    w = weight(spec, 20, 512, values=values, books=books)
    a, lookup = encode(x, spec, books, absmax_row_scale(x)), Lookup.of(books.to(DEVICE))
    for integers in (True, False):
        assert_product(product(encode_operand(x.to(DEVICE), lookup, spec, None, integers), w), decode(a), w.encoded)
        in_int8 = decode(encode_int8(x, array_size))  # 127 * 31
        assert_product(product(encode_operand(x.to(DEVICE), None, spec, None, integers), w), in_int8, w.encoded)


@pytest.mark.parametrize(("bad", "integers"), crossed([float("nan"), float("inf"), -float("inf")], [True, False]))
def test_a_non_finite_row_gives_nan_and_disturbs_no_other(bad: float, integers: bool) -> None:
    w, x = weight(FormatSpec(), 20, 200), activation(4, 200)
    lookup = Lookup.of(w.codebooks)
    clean = product(encode_operand(x.to(DEVICE), lookup, FormatSpec(), None, integers), w)
    x[2, 123] = bad
    others = [0, 1, 3]
    out = product(encode_operand(x.to(DEVICE), lookup, FormatSpec(), None, integers), w)
    assert bool(out[2].isnan().all())
    assert torch.equal(out[others], clean[others])


def test_entries_in_small_arrays_are_refused() -> None:
    w = weight(FormatSpec(8, 16), 20, 64)
    a = Activation(torch.zeros(3, 64, dtype=torch.int8, device=DEVICE))
    with pytest.raises(ValueError, match="format 8x16 has arrays below 32: encode to scaled entries"):
        product(a, w)


def test_no_rows() -> None:
    w = weight(FormatSpec(), 20, 64)
    assert product(Activation(torch.empty(0, 64, device=DEVICE)), w).shape == (0, 20)
