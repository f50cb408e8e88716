"""The function bodies of the linears against the torch ops, in ONNX Runtime."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.ops import (
    linear,
    linear_float_activation,
    linear_int8_activation,
    quantize_activation,
    quantize_activation_int8,
    quantize_weight,
)
from tests.export.single_node import Operator, sums_empty_tensors
from tests.format.cases import ALL_SPECS, EVERY_SPEC, codebooks_of, int8

COLUMNS, ROWS = 200, 7


def operands(spec, leading=(2, 3)):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(*leading, COLUMNS, generator=generator)
    w, bias = torch.randn(ROWS, COLUMNS, generator=generator), torch.randn(ROWS, generator=generator)
    books, w_books = int8(codebooks_of(1, spec.num_codebooks)), int8(codebooks_of(2, spec.num_codebooks))
    return x, books, (*quantize_weight(w, w_books, spec.array_size), w_books), bias


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    scale = expected.nan_to_num().abs().max() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * float(scale), equal_nan=True)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("spec", EVERY_SPEC, ids=lambda spec: spec.name)
def test_linear(spec, with_bias):
    x, books, weight, bias = operands(spec)
    x[1, 2, 3] = torch.inf
    bias = bias if with_bias else None
    packed = (*quantize_activation(x, books, spec.array_size), books)
    expected = linear(*packed, *weight, bias, COLUMNS, spec.array_size, torch.float32)
    node = Operator("Linear", in_features=COLUMNS, array_size=spec.array_size)
    (actual,) = node(*packed, *weight, bias)
    assert actual[1, 2].isnan().all()
    assert not actual[0].isnan().any()
    assert_close(actual, expected)


@pytest.mark.parametrize(("spec", "leading"), [*((spec, (2, 3)) for spec in ALL_SPECS[::3]), (ALL_SPECS[0], ())])
def test_linear_int8_activation(spec, leading):
    x, _, weight, bias = operands(spec, leading)
    x.view(-1, COLUMNS)[-1, 3] = torch.inf
    encoded = quantize_activation_int8(x, spec.array_size)
    node = Operator("LinearInt8Activation", in_features=COLUMNS, array_size=spec.array_size)
    (actual,) = node(*encoded, *weight, bias)
    assert actual.view(-1, ROWS)[-1].isnan().all()
    assert_close(actual, linear_int8_activation(*encoded, *weight, bias, COLUMNS, spec.array_size, torch.float32))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("spec", ALL_SPECS[::3], ids=lambda spec: spec.name)
def test_linear_float_activation(spec, with_bias):
    x, _, weight, bias = operands(spec)
    bias = bias if with_bias else None
    node = Operator("LinearFloatActivation", array_size=spec.array_size)
    (actual,) = node(x, *weight, bias)
    assert_close(actual, linear_float_activation(x, *weight, bias, spec.array_size))


EMPTY = [pytest.param(shape, marks=sums_empty_tensors) for shape in ((0,), (2, 0))]


@pytest.mark.parametrize("leading", [(), *EMPTY], ids=str)
def test_any_leading_dimensions(leading):
    spec = ALL_SPECS[-1]
    x, books, weight, bias = operands(spec, leading)
    packed = (*quantize_activation(x, books, spec.array_size), books)
    node = Operator("Linear", in_features=COLUMNS, array_size=spec.array_size)
    (actual,) = node(*packed, *weight, bias)
    assert_close(actual, linear(*packed, *weight, bias, COLUMNS, spec.array_size, torch.float32))


def test_float_activation_keeps_its_type():
    spec = ALL_SPECS[-2]
    x, _, weight, bias = operands(spec)
    node = Operator("LinearFloatActivation", torch.float16, array_size=spec.array_size)
    (actual,) = node(x.half(), *weight, bias)
    expected = linear_float_activation(x.half(), *weight, bias, spec.array_size).float()
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
