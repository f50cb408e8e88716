"""The function bodies of the grouped linears against the torch ops, in ONNX Runtime."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.format import encode_stack
from lobcq_fx.ops import (
    grouped_linear,
    grouped_linear_float_activation,
    grouped_linear_int8_activation,
    quantize_activation,
    quantize_activation_int8,
)
from tests.export.single_node import Operator, sums_empty_tensors
from tests.export.test_linear import assert_close
from tests.format.cases import ALL_SPECS, codebooks_of, int8

COLUMNS, OUTPUTS, EXPERTS, TOKENS = 200, 7, 4, 6
ROWS = torch.tensor([5, 0, 0, 3, 2, 1, 5, 5, 4])
ENDS = ([2, 2, 5, 9], [0, 0, 0, 0], [9, 3, -7, 2**31 - 1], [1, 2, 3, 4])


def operands(spec):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(TOKENS, COLUMNS, generator=generator)
    w = torch.randn(EXPERTS, OUTPUTS, COLUMNS, generator=generator) * torch.tensor([1.0, 0.1, 3.0, 1.0]).view(4, 1, 1)
    books, w_books = int8(codebooks_of(1, spec.num_codebooks)), int8(codebooks_of(2, spec.num_codebooks))
    stack = encode_stack(w, spec, w_books)
    return x, books, (stack.codes, stack.selectors, stack.scales, stack.tensor_scale, w_books)


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("spec", ALL_SPECS[::5], ids=lambda spec: spec.name)
def test_all_modes(spec, ends):
    x, books, stack = operands(spec)
    x[3, 3] = torch.inf
    groups = torch.tensor(ends, dtype=torch.int32), ROWS
    size = {"in_features": COLUMNS, "array_size": spec.array_size}
    tail = (*groups, COLUMNS, spec.array_size, torch.float32)
    packed = (*quantize_activation(x, books, spec.array_size), books)
    (actual,) = Operator("GroupedLinear", **size)(*packed, *stack, *groups)
    expected = grouped_linear(*packed, *stack, *tail)
    assert_close(actual, expected)
    assert torch.equal(actual.isnan(), expected.isnan())
    encoded = quantize_activation_int8(x, spec.array_size)
    (actual,) = Operator("GroupedLinearInt8Activation", **size)(*encoded, *stack, *groups)
    assert_close(actual, grouped_linear_int8_activation(*encoded, *stack, *tail))
    x[3, 3] = 0.0
    (actual,) = Operator("GroupedLinearFloatActivation", array_size=spec.array_size)(x, *stack, *groups)
    assert_close(actual, grouped_linear_float_activation(x, *stack, *groups, spec.array_size))


@sums_empty_tensors
def test_no_rows():
    x, books, stack = operands(ALL_SPECS[-1])
    size = {"in_features": COLUMNS, "array_size": ALL_SPECS[-1].array_size}
    packed = (*quantize_activation(x, books, size["array_size"]), books)
    groups = torch.tensor([0, 0, 0, 0], dtype=torch.int32), ROWS[:0]
    (actual,) = Operator("GroupedLinear", **size)(*packed, *stack, *groups)
    assert actual.shape == (0, OUTPUTS)


def test_float_activation_keeps_its_type():
    spec = ALL_SPECS[-2]
    x, _, stack = operands(spec)
    groups = torch.tensor(ENDS[0], dtype=torch.int32), ROWS
    node = Operator("GroupedLinearFloatActivation", torch.float16, array_size=spec.array_size)
    (actual,) = node(x.half(), *stack, *groups)
    expected = grouped_linear_float_activation(x.half(), *stack, *groups, spec.array_size).float()
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-2)
