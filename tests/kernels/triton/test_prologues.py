"""Norms and gated activations inside the encoders, against the rules of `ops/prologues.py` in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.triton import encode as encode_module
from lobcq_fx.kernels.triton.encode import encode_rows
from lobcq_fx.kernels.triton.encode_operand import encode_operand
from lobcq_fx.kernels.triton.floats import narrow
from lobcq_fx.kernels.triton.launching import ROUNDED_APART
from lobcq_fx.kernels.triton.lookup import Lookup
from lobcq_fx.kernels.triton.prologues import (
    AddRmsNorm,
    LayerNorm,
    Prologue,
    RmsNorm,
    SiluMul,
    operands,
    row_statistics,
    tile_to_encode,
)
from lobcq_fx.ops import prologues as rules
from tests.kernels.triton.operands import DEVICE, assert_same_bits, codebooks
from tests.sweeps import crossed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["RMSNorm", "RMSNorm rounded once", "RMSNorm of Gemma", "add, RMSNorm", "LayerNorm", "SiLU, multiply"]
OF_TWO = ["add, RMSNorm", "SiLU, multiply"]
EPS = 1e-2


@triton.jit
def _exp(x, out, COUNT: tl.constexpr, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    tl.store(out + i, tl.exp(tl.load(x + i, mask=i < COUNT)), mask=i < COUNT)


def device_exp(x: Tensor) -> Tensor:
    """fp32 -> what kernels take for exp."""
    x, out = x.contiguous().to(DEVICE), torch.empty(x.shape, device=DEVICE)
    _exp[(1,)](x, out, x.numel(), triton.next_power_of_2(x.numel() + 1), **ROUNDED_APART)
    return out.cpu()


@pytest.fixture(autouse=True)
def the_rule_takes_the_kernels_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "exp", device_exp)


@triton.jit
def _results(x, out, prologue, columns, row_stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    statistics = row_statistics(x, row, columns, prologue, TILE)
    for start in range(0, columns, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < columns
        numbers = tile_to_encode(x, row, columns, column, inside, statistics, prologue)
        tl.store(out + row * columns + column, narrow(numbers, out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Case:
    """A prologue, and what its rule makes of x [M, K]: what is to be encoded, and the sum with the residual."""

    x: Tensor
    prologue: Prologue
    expected: Tensor
    sums: Tensor

    def result(self) -> Tensor:
        """What the prologue hands to the encoders."""
        x, out = self.x.to(DEVICE), torch.empty(self.x.shape, dtype=self.x.dtype, device=DEVICE)
        _results[(x.shape[0],)](x, out, operands(self.prologue), x.shape[1], x.stride(0), 128, **ROUNDED_APART)
        return out


def case(kind: str, x: Tensor, second: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = EPS) -> Case:
    on_device = [None if t is None else t.to(DEVICE) for t in (second, weight, bias)]
    prologue: Prologue
    if kind == "SiLU, multiply":
        assert on_device[0] is not None
        return Case(x, SiluMul(on_device[0]), rules.silu_mul(x, second), x)
    if kind == "LayerNorm":
        return Case(x, LayerNorm(*on_device[1:], eps), rules.layer_norm(x, weight, bias, eps), x)
    offset, round_first = float(kind == "RMSNorm of Gemma"), kind in ("RMSNorm", "add, RMSNorm")
    prologue = norm = RmsNorm(on_device[1], eps, offset, round_first)
    total = x
    if kind == "add, RMSNorm":
        assert on_device[0] is not None
        total = second + x
        prologue = AddRmsNorm(on_device[0], torch.empty(x.shape, dtype=x.dtype, device=DEVICE), norm)
    return Case(x, prologue, rules.rms_norm(total, weight, eps, offset, round_first), total)


def values(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, up or residual, weight and bias; x and the second with means other than 0."""
    generator = torch.Generator().manual_seed(seed + columns)
    x, second = (torch.randn(rows, columns, generator=generator) * 3 + 0.5 for _ in range(2))
    weight, bias = (torch.randn(columns, generator=generator) for _ in range(2))
    return x.to(dtype), second.to(dtype), weight.to(dtype), bias.to(dtype)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """The same bits, but for NaN's."""
    assert torch.equal(actual.isnan().cpu(), expected.isnan())
    assert_same_bits(actual.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def assert_encodes(one: Case, spec: FormatSpec, static: Tensor | None = None, rotated: bool = False) -> None:
    """Every byte that the encoders give is the one that they give for the rule's result; the sum is stored."""
    lookup, x, expected = Lookup.of(codebooks(spec)), one.x.to(DEVICE), one.expected.to(DEVICE)
    calls: list[Callable[..., Any]] = [
        lambda x, prologue: vars(encode_operand(x, lookup, spec, static, True, prologue, rotated)).values(),
        lambda x, prologue: vars(encode_operand(x, lookup, spec, static, False, prologue, rotated)).values(),
    ]
    if not rotated:
        calls.append(lambda x, prologue: encode_rows(x, lookup, spec, static, prologue))
    for call in calls:
        if isinstance(one.prologue, AddRmsNorm):
            one.prologue.sums.fill_(7)
        for actual, wanted in zip(call(x, one.prologue), call(expected, None), strict=True):
            assert (actual is None) == (wanted is None)
            if actual is not None:
                assert_same_bits(actual, wanted)
        if isinstance(one.prologue, AddRmsNorm):
            assert_equal(one.prologue.sums, one.sums)


@pytest.mark.parametrize(("kind", "dtype", "shape"), crossed(KINDS, DTYPES, [(1, 1), (3, 77), (12, 300)]))
def test_every_rounding_is_the_rules(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    one = case(kind, *values(*shape, dtype))
    assert_equal(one.result(), one.expected)


@pytest.mark.parametrize(("kind", "dtype"), crossed(KINDS, DTYPES))
def test_parameters_may_be_missing_or_of_another_dtype(kind: str, dtype: torch.dtype) -> None:
    x, second, weight, bias = values(8, 200, dtype)
    other = [t.float() * (1 + 2**-20) for t in (weight, bias)]
    for parameters in ((None, None), (weight, None), (None, bias), other):
        one = case(kind, x, second, *parameters)
        assert_equal(one.result(), one.expected)


@pytest.mark.parametrize(("kind", "name", "columns"), crossed(KINDS, ["1x16", "2x128", "8x64", "16x32"], [200, 1]))
def test_every_form_of_encoding(kind: str, name: str, columns: int) -> None:
    assert_encodes(case(kind, *values(1, columns, torch.bfloat16)), FormatSpec.from_name(name))


@pytest.mark.parametrize(("kind", "dtype"), crossed(KINDS, DTYPES))
def test_encoding_of_every_dtype(kind: str, dtype: torch.dtype) -> None:
    assert_encodes(case(kind, *values(2, 150, dtype)), FormatSpec())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_rotated_then(kind: str) -> None:
    assert_encodes(case(kind, *values(2, 192, torch.bfloat16)), FormatSpec(), rotated=True)


@pytest.mark.parametrize(("kind", "programs"), crossed(KINDS, [1, 2]))
def test_a_row_of_several_tiles(monkeypatch: pytest.MonkeyPatch, kind: str, programs: int) -> None:
    """Three, encoded by one program or shared by two."""
    monkeypatch.setattr(encode_module, "ENOUGH_PROGRAMS", programs)
    assert_encodes(case(kind, *values(1, 2100, torch.bfloat16)), FormatSpec())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_strided(kind: str) -> None:
    """x in steps of 500, up or residual in steps of 700."""
    x, second = torch.randn(3, 500)[:, 100:333].bfloat16(), torch.randn(3, 700).bfloat16()[:, 7:240]
    assert_encodes(case(kind, x, second, torch.randn(233), torch.randn(233)), FormatSpec())


@pytest.mark.parametrize(("kind", "shape"), crossed(KINDS, [(0, 64), (2, 0)]))
def test_empty_operands(kind: str, shape: tuple[int, int]) -> None:
    assert_encodes(case(kind, *values(*shape, torch.bfloat16)), FormatSpec())


@pytest.mark.parametrize(("kind", "where"), [*((kind, 0) for kind in KINDS), *((kind, 1) for kind in OF_TWO)])
def test_rows_that_are_not_finite_are_marked_and_disturb_no_other(kind: str, where: int) -> None:
    """In x, or in what is added to it or multiplied with it."""
    spec, operand = FormatSpec(), values(4, 200, torch.bfloat16)
    clean = case(kind, *operand).expected
    operand[where][1, 170], operand[where][2, 3] = float("nan"), -float("inf")
    one = case(kind, *operand)
    assert_encodes(one, spec, torch.tensor(0.01, device=DEVICE))
    lookup = Lookup.of(codebooks(spec))
    encoded = encode_operand(one.x.to(DEVICE), lookup, spec, prologue=one.prologue)
    before = encode_operand(clean.to(DEVICE), lookup, spec)
    for part in ("values", "array_scales", "row_scales"):
        assert_same_bits(getattr(encoded, part)[[0, 3]], getattr(before, part)[[0, 3]])
    assert encoded.row_scales is not None
    assert encoded.array_scales is not None
    assert encoded.row_scales.isnan().flatten().tolist() == [False, True, True, False]
    assert bool(encoded.array_scales[1:3].isnan().all())


@pytest.mark.parametrize(("kind", "eps"), crossed(KINDS, [EPS, 0.0]))
def test_rows_of_zeros_and_of_one_number(kind: str, eps: float) -> None:
    """Without an epsilon a norm divides 0 by 0."""
    x, second, weight, bias = values(3, 100, torch.float32)
    x[0], second[0], x[1] = 0.0, 0.0, 0.3
    assert_encodes(case(kind, x, second, weight, bias, eps), FormatSpec())


@pytest.mark.parametrize(("kind", "exponent"), crossed(KINDS, [-140, -60, 60, 126]))
def test_magnitudes_whose_squares_fp32_does_not_hold(kind: str, exponent: int) -> None:
    x, second, weight, bias = values(3, 200, torch.float32)
    one = case(kind, torch.ldexp(x / 16, torch.tensor(exponent)), second, weight, bias, 0.0)
    assert_equal(one.result(), one.expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_far_from_zero(kind: str) -> None:
    """The variance is about the mean as it is before it is rounded; and beyond a row nothing is subtracted from."""
    x, second, *_ = values(3, 150, torch.float32)
    one = case(kind, x / 300 + 1000, second, None, None)
    assert_equal(one.result(), one.expected)
    assert_encodes(one, FormatSpec())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "SiLU, multiply"])
def test_the_order_of_a_sum_does_not_show(kind: str) -> None:
    """In fp32 it would, in most rows."""
    x, _, weight, bias = values(8, 700, torch.float32)
    orders = (x, x.flip(1))
    one, other = (np.cumsum(order.numpy() ** 2, axis=1)[:, -1] for order in orders)
    assert (one != other).sum() > 4
    zeros = torch.zeros_like(x)
    forth = case(kind, x, zeros, weight, bias).result()
    back = case(kind, x.flip(1), zeros, weight.flip(0), bias.flip(0)).result()
    assert_same_bits(forth, back.flip(1))
