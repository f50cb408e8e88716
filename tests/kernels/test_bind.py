"""The ops bound to the CPU core give the default implementations' results, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import lobcq_fx.ops
from lobcq_fx.format import FormatSpec, encode, universal_codebooks
from lobcq_fx.kernels.bind import bind_cpu_core
from lobcq_fx.kernels.cpu.installed import SWITCH
from tests.sweeps import crossed

pytestmark = pytest.mark.skipif(not bind_cpu_core(), reason="the CPU core was not built, or is switched off")

CONFIGS = ["1x16", "2x32", "4x64", "8x64", "16x128"]
SHAPES = [(3, 64), (2, 3, 200), (1, 7), (0, 64), (2, 0, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(name, shape, dtype):
    generator = torch.Generator().manual_seed(len(shape))
    spec = FormatSpec.from_name(name)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = encode(torch.randn(40, shape[-1], generator=generator), spec, universal_codebooks(spec.num_codebooks))
    bias = torch.randn(40, generator=generator).to(dtype)
    return x, (weight.codes, weight.selectors, weight.scales, weight.tensor_scale, weight.codebooks), bias, spec


def same_bits(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert one.is_contiguous() == other.is_contiguous()  # strides of 0 or 1 elements are arbitrary
    assert torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(("name", "shape", "dtype"), crossed(CONFIGS, SHAPES, DTYPES))
def test_bound_ops_equal_the_default_implementations(name, shape, dtype):
    x, weight, bias, spec = operands(name, shape, dtype)
    for static in (None, torch.tensor(1e-4)):
        expected = lobcq_fx.ops.quantize_activation(x, weight[-1], spec.array_size, static)
        actual = torch.ops.lobcq.quantize_activation(x, weight[-1], spec.array_size, static)
        for one, other in zip(actual, expected, strict=True):
            same_bits(one, other)
        tail = (*weight, bias, shape[-1], spec.array_size, dtype)
        call = (*expected, weight[-1], *tail)
        same_bits(torch.ops.lobcq.linear(*call), lobcq_fx.ops.linear(*call))
        expected = lobcq_fx.ops.quantize_activation_int8(x, spec.array_size, static)
        actual = torch.ops.lobcq.quantize_activation_int8(x, spec.array_size, static)
        for one, other in zip(actual, expected, strict=True):
            same_bits(one, other)
        same_bits(
            torch.ops.lobcq.linear.int8_activation(*expected, *tail),
            lobcq_fx.ops.linear_int8_activation(*expected, *tail),
        )
    call = (x, *weight, bias, spec.array_size)
    same_bits(torch.ops.lobcq.linear.float_activation(*call), lobcq_fx.ops.linear_float_activation(*call))


@pytest.mark.parametrize(("name", "shape", "dtype"), crossed(CONFIGS, [(40, 200), (1, 7), (0, 64), (3, 0)], DTYPES))
def test_weights_are_encoded_as_by_default(name, shape, dtype):
    spec, w = FormatSpec.from_name(name), torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    books = universal_codebooks(spec.num_codebooks)
    for weight in (w, w.t().contiguous().t()):
        expected = lobcq_fx.ops.quantize_weight(weight, books, spec.array_size)
        for one, other in zip(torch.ops.lobcq.quantize_weight(weight, books, spec.array_size), expected, strict=True):
            same_bits(one, other)
        expected = lobcq_fx.ops.quantize_weight_searched(weight, books, spec.array_size)
        actual = torch.ops.lobcq.quantize_weight.searched(weight, books, spec.array_size)
        for one, other in zip(actual, expected, strict=True):
            same_bits(one, other)
        call = (*expected, books, shape[1], spec.array_size)
        same_bits(torch.ops.lobcq.dequantize_weight(*call), lobcq_fx.ops.dequantize_weight(*call))
        call = (weight, *expected, books, spec.array_size)
        actual, expected = torch.ops.lobcq.weight_squares(*call), lobcq_fx.ops.weight_squares(*call)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


def test_a_weight_that_is_not_finite_is_named():
    w = torch.zeros(5, 64)
    w[3, 17] = torch.inf
    with pytest.raises(ValueError, match=r"x\[3, 17\] is inf: a weight must be finite"):
        torch.ops.lobcq.quantize_weight(w, universal_codebooks(8), 64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("static", [None, torch.tensor(1e-4)])
def test_a_bad_row_gives_nan_in_that_row_alone(bad, static):
    x, weight, bias, spec = operands("8x64", (3, 200), torch.float32)
    x[1, 150] = bad
    packed = torch.ops.lobcq.quantize_activation(x, weight[-1], spec.array_size, static)
    out = torch.ops.lobcq.linear(*packed, weight[-1], *weight, bias, 200, spec.array_size, torch.float32)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_activations_that_are_not_contiguous():
    x, weight, _, spec = operands("8x64", (6, 64), torch.float32)
    for view in (x.t().contiguous().t(), x[::2], x.expand(2, 6, 64)):
        expected = lobcq_fx.ops.quantize_activation(view, weight[-1], spec.array_size)
        for one, other in zip(torch.ops.lobcq.quantize_activation(view, weight[-1], 64), expected, strict=True):
            same_bits(one, other)


def test_a_switch_leaves_the_default_implementations_in_place():
    code = "from lobcq_fx.kernels.bind import bind_cpu_core; assert not bind_cpu_core()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, SWITCH: "0"})
