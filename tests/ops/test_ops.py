"""The lobcq:: ops against the float product, and under torch.library.opcheck."""

from __future__ import annotations

import pytest
import torch

import lobcq_fx.ops
from lobcq_fx.errors import LobcqError
from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, encode_int8, rotate, universal_codebooks
from tests.sweeps import sweep

SHAPES = [(4, 64), (2, 3, 200), (1, 64), (0, 64), (5, 72), (2, 0, 64)]
CONFIGS = [FormatSpec(8, 64), FormatSpec(16, 128), FormatSpec(2, 32), FormatSpec(1, 16)]

# Without "test_schema", which compares inputs with allclose: for those in float8, which the linears have, torch lacks
# a kernel, as `test_the_schema_test_cannot_compare_float8` sees. assert_functional checks the same.
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def assert_functional(op, args):
    """The op changes no input and returns no view of one, as its schema says."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    before = [t.clone() for t in tensors]
    outputs = op(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(
            tensor.contiguous().reshape(-1).view(torch.uint8), old.contiguous().reshape(-1).view(torch.uint8)
        )
    storages = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    assert not storages & {out.untyped_storage().data_ptr() for out in outputs if out.numel()}


def operands(shape, spec, dtype=torch.float32, rows=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(rows, shape[-1], generator=generator) * 0.05
    bias = torch.randn(rows, generator=generator)
    codebooks = universal_codebooks(spec.num_codebooks)
    return x, encode(weight, spec, codebooks), bias, codebooks


def weight_args(w):
    return w.codes, w.selectors, w.scales, w.tensor_scale, w.codebooks


def feedback_args():
    generator = torch.Generator().manual_seed(3)
    weight, errors = torch.randn(2, 5, 128, generator=generator)
    return (
        weight,
        errors,
        torch.randn(128, 128, generator=generator).triu(1) + torch.eye(128),
        torch.ones(128),
        torch.tensor(1e-4),
    )


@pytest.mark.parametrize("spec", CONFIGS, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_linear_is_the_product_of_the_decoded_operands(shape, spec, static):
    x, w, bias, codebooks = operands(shape, spec)
    scale = torch.tensor(3.0 / 13888) if static else None
    packed = torch.ops.lobcq.quantize_activation(x, codebooks, spec.array_size, scale)
    out = torch.ops.lobcq.linear(*packed, codebooks, *weight_args(w), bias, shape[-1], spec.array_size, torch.float32)

    rows = x.reshape(-1, shape[-1])
    a = decode(encode(rows, spec, codebooks, absmax_row_scale(rows) if scale is None else scale))
    assert_product_of(a, w, bias, out, shape)


@pytest.mark.parametrize("spec", CONFIGS, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_int8_activations(shape, spec, static):
    x, w, bias, _ = operands(shape, spec)
    scale = torch.tensor(3.0 / 56896) if static else None
    encoded = torch.ops.lobcq.quantize_activation_int8(x, spec.array_size, scale)
    tail = (bias, shape[-1], spec.array_size, torch.float32)
    out = torch.ops.lobcq.linear.int8_activation(*encoded, *weight_args(w), *tail)
    assert_product_of(decode(encode_int8(x.reshape(-1, shape[-1]), spec.array_size, scale)), w, bias, out, shape)


def assert_product_of(a, w, bias, out, shape):
    """`a` are the decoded rows."""
    expected = (a.double() @ decode(w).double().t() + bias).float().view(*shape[:-1], 48)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# A fake kernel treats the two halves alike.
@pytest.mark.parametrize(
    "dtype", sweep([torch.float32, torch.bfloat16, torch.float16], [torch.float32, torch.bfloat16])
)
def test_dtypes_and_strides_agree_with_the_fake_kernels(dtype):
    spec = FormatSpec(8, 64)
    x, w, bias, codebooks = operands((2, 3, 200), spec, dtype)
    x = x.transpose(0, 1)  # not contiguous
    bias = bias.to(dtype)
    packed = torch.ops.lobcq.quantize_activation(x, codebooks, 64)
    in_int8 = torch.ops.lobcq.quantize_activation_int8(x, 64)
    states = operands((2, 5, 3, 64), spec, dtype)[0].transpose(1, 2)  # as projections lay them out
    rows = torch.ops.lobcq.quantize_states(states, codebooks, 64)
    checks = [
        (torch.ops.lobcq.quantize_activation.default, (x, codebooks, 64)),
        (torch.ops.lobcq.quantize_activation.default, (x, codebooks, 64, torch.tensor(1e-3))),
        (torch.ops.lobcq.linear.default, (*packed, codebooks, *weight_args(w), bias, 200, 64, dtype)),
        (torch.ops.lobcq.linear.default, (*packed, codebooks, *weight_args(w), None, 200, 64, torch.float32)),
        (torch.ops.lobcq.quantize_activation_int8.default, (x, 64)),
        (torch.ops.lobcq.quantize_activation_int8.default, (x, 64, torch.tensor(1e-3))),
        (torch.ops.lobcq.linear.int8_activation, (*in_int8, *weight_args(w), bias, 200, 64, dtype)),
        (torch.ops.lobcq.linear.float_activation, (x, *weight_args(w), bias, 64)),
        (torch.ops.lobcq.rotate.default, (x[..., :128], 64)),
        (torch.ops.lobcq.quantize_weight.default, (x[0], codebooks, 64)),
        (torch.ops.lobcq.quantize_weight.searched, (x[0], codebooks, 64)),
        (torch.ops.lobcq.dequantize_weight.default, (*weight_args(w), 200, 64)),
        (torch.ops.lobcq.weight_squares.default, (torch.zeros(48, 200, dtype=dtype), *weight_args(w), 64)),
        (torch.ops.lobcq.quantize_states.default, (states, codebooks, 64)),
        (torch.ops.lobcq.dequantize_states.default, (rows, codebooks, 3, 64, 64, dtype)),
        (torch.ops.lobcq.attention.default, (states, rows, rows, codebooks, None, 3, 64, 64, 64, 0.125)),
        (torch.ops.lobcq.attention.default, (states, rows, rows, codebooks, None, 3, 64, 64, 64, 0.125, True)),
        (torch.ops.lobcq.compensate.default, (*feedback_args(), codebooks, 64)),
    ]
    for op, args in checks:
        takes_float8 = any(isinstance(one, torch.Tensor) and one.dtype == torch.float8_e4m3fn for one in args)
        torch.library.opcheck(op, args, test_utils=OPCHECKS if takes_float8 else (*OPCHECKS, "test_schema"))
        assert_functional(op, args)


def test_the_schema_test_cannot_compare_float8():
    """When this fails, torch has learnt it: then OPCHECKS should have "test_schema"."""
    x, w, bias, codebooks = operands((2, 200), FormatSpec(8, 64))
    packed = torch.ops.lobcq.quantize_activation(x, codebooks, 64)
    for op, args in (
        (torch.ops.lobcq.linear.default, (*packed, codebooks, *weight_args(w), bias, 200, 64, torch.float32)),
        (torch.ops.lobcq.linear.float_activation, (x, *weight_args(w), bias, 64)),
    ):
        with pytest.raises(Exception, match="not implemented for 'Float8_e4m3fn'"):
            torch.library.opcheck(op, args, test_utils="test_schema")


def test_float_activation_is_the_product_with_the_decoded_weight():
    spec = FormatSpec(8, 64)
    x, w, bias, _ = operands((2, 3, 200), spec)
    out = torch.ops.lobcq.linear.float_activation(x, *weight_args(w), bias, 64)
    torch.testing.assert_close(out, x @ decode(w).t() + bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("array_size", [16, 32, 64, 128])
@pytest.mark.parametrize("shape", [(4, 128), (2, 3, 256), (0, 128), (128,), (3, 0)], ids=str)
def test_rotation_is_the_format_s_of_the_widened_values(shape, array_size, dtype):
    x = (10 * torch.randn(shape)).to(dtype)
    expected = rotate(x.float(), array_size)
    for op in (torch.ops.lobcq.rotate, lobcq_fx.ops.rotate):
        actual = op(x, array_size)
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_activation_spoils_its_own_row_and_no_other(bad, static):
    spec = FormatSpec(8, 64)
    x, w, bias, codebooks = operands((5, 200), spec)
    scale = torch.tensor(1e-3) if static else None

    def run(x):
        packed = torch.ops.lobcq.quantize_activation(x, codebooks, 64, scale)
        in_int8 = torch.ops.lobcq.quantize_activation_int8(x, 64, scale)
        tail = (*weight_args(w), bias, 200, 64, torch.float32)
        return torch.ops.lobcq.linear(*packed, codebooks, *tail), torch.ops.lobcq.linear.int8_activation(
            *in_int8, *tail
        )

    clean = run(x)
    x[2, 131] = bad
    others = torch.tensor([0, 1, 3, 4])
    for spoiled, before in zip(run(x), clean, strict=True):
        assert spoiled[2].isnan().all()
        assert torch.equal(spoiled[others], before[others])


def test_padding_contributes_nothing_without_a_zero_entry():
    spec = FormatSpec(1, 64)
    codebooks = torch.tensor([[-31, -29, -27, -25, -23, -21, -19, -17, 1, 3, 5, 7, 9, 11, 13, 31]], dtype=torch.int8)
    x, weight = torch.randn(3, 70), torch.randn(4, 70)
    w = encode(weight, spec, codebooks)
    packed = torch.ops.lobcq.quantize_activation(x, codebooks, 64)
    out = torch.ops.lobcq.linear(*packed, codebooks, *weight_args(w), None, 70, 64, torch.float32)
    a = encode(x, spec, codebooks, absmax_row_scale(x))
    torch.testing.assert_close(out, decode(a) @ decode(w).t())


def test_backward_says_that_the_ops_are_inference_only():
    spec = FormatSpec(8, 64)
    x, w, bias, _ = operands((3, 64), spec)
    out = torch.ops.lobcq.linear.float_activation(x.requires_grad_(), *weight_args(w), bias, 64)
    with pytest.raises(LobcqError, match="inference only"):
        out.sum().backward()
