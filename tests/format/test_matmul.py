"""matmul against the exact product of the decoded operands, and against the rule's integer dot products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, matmul, scale_product, universal_codebooks
from tests.format import oracle
from tests.format.cases import ALL_SPECS, codebooks_of, int8, matrix

NO_ZERO = [[-31, -23, -17, -13, -11, -7, -5, -3, 3, 5, 7, 11, 13, 17, 23, 31]] * 8
"""A scalar 0 decodes to -3 times its scale: a padded position that took part would show."""


def operands(spec, columns, codebooks, rows=(5, 7), kind="normal"):
    x = torch.from_numpy(matrix(kind, rows[0], columns, seed=1))
    w = torch.from_numpy(matrix("normal", rows[1], columns, seed=2)) * 0.02
    a = encode(x, spec, int8(codebooks), absmax_row_scale(x))
    return a, encode(w, spec, int8(codebooks))


def assert_close_to_fp64(out, a, w, bias=None):
    """fp32 summation: an error of at most K units in the last place of the sum of magnitudes."""
    left, right = decode(a).double(), decode(w).double()
    expected = left @ right.t() + (0 if bias is None else bias.double())
    bound = (a.columns + 8) * 2.0**-24 * (left.abs() @ right.abs().t() + (0 if bias is None else bias.abs().double()))
    assert out.dtype == torch.float32
    assert out.shape == expected.shape
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("columns", [1, 77, 256])
def test_product_of_the_decoded_operands(spec, columns):
    a, w = operands(spec, columns, codebooks_of(columns, spec.num_codebooks), kind="heavy")
    assert_close_to_fp64(matmul(a, w), a, w)


@pytest.mark.parametrize("columns", [16, 40, 100])
def test_sum_of_integer_dot_products(columns):
    """The rule as hardware executes it: an exact integer dot product an array, one scale product each."""
    spec, codebooks = FormatSpec(4, 16), codebooks_of(3, 4)
    a, w = operands(spec, columns, codebooks, rows=(3, 2))
    x, y = matrix("normal", 3, columns, 1), matrix("normal", 2, columns, 2) * np.float32(0.02)
    t_a, t_w = a.tensor_scale.flatten().numpy(), w.tensor_scale.numpy()
    expected = [
        [oracle.integer_dot_products(x[m], y[n], 16, codebooks, codebooks, t_a[m], t_w) for n in range(2)]
        for m in range(3)
    ]
    torch.testing.assert_close(matmul(a, w).double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("columns", [1, 7, 63, 65, 127])
def test_padding_contributes_nothing(columns):
    spec = FormatSpec(8, 64)
    a, w = operands(spec, columns, NO_ZERO)
    assert (decode(encode(torch.zeros(1, 1), spec, int8(NO_ZERO), torch.tensor(1.0))) == 0).all()
    assert_close_to_fp64(matmul(a, w), a, w)
    more = spec.padded_columns(columns) - columns
    wide = operands(spec, columns + more, NO_ZERO)
    assert matmul(a, w).shape == matmul(*wide).shape


def test_a_padded_position_s_code_does_not_matter():
    spec = FormatSpec(8, 64)
    a, w = operands(spec, 70, NO_ZERO)
    before = matmul(a, w)
    for operand in (a, w):
        operand.codes[:, 35:] = 0xFF  # scalars 70 and on
    assert torch.equal(matmul(a, w), before)


def test_different_formats_multiply():
    x = torch.from_numpy(matrix("normal", 4, 100, seed=1))
    a = encode(x, FormatSpec(1, 16), universal_codebooks(1), absmax_row_scale(x))
    w = encode(x[:3], FormatSpec(16, 128), universal_codebooks(16))
    assert_close_to_fp64(matmul(a, w), a, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias(dtype):
    a, w = operands(FormatSpec(8, 64), 100, codebooks_of(0, 8))
    bias = torch.linspace(-2, 2, 7).to(dtype)
    assert_close_to_fp64(matmul(a, w, bias), a, w, bias.float())


def test_static_activation_scale():
    x = torch.from_numpy(matrix("normal", 4, 100, seed=1))
    a = encode(x, FormatSpec(8, 64), universal_codebooks(8), torch.tensor(3.0 / 13888))
    w = encode(x, FormatSpec(8, 64), universal_codebooks(8))
    assert_close_to_fp64(matmul(a, w), a, w)


@pytest.mark.parametrize("shape", [(0, 64, 7), (5, 64, 0), (5, 0, 7)])
def test_empty(shape):
    m, k, n = shape
    spec, codebooks = FormatSpec(8, 64), universal_codebooks(8)
    a = encode(torch.ones(m, k), spec, codebooks, torch.tensor(1.0))
    w = encode(torch.ones(n, k), spec, codebooks)
    assert torch.equal(matmul(a, w), torch.zeros(m, n))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("static", [False, True])
def test_a_bad_activation_row_gives_a_nan_row_and_no_other(bad, static):
    x = torch.from_numpy(matrix("normal", 5, 200, seed=1))
    w = encode(torch.from_numpy(matrix("sparse", 7, 200, seed=2)), FormatSpec(8, 64), universal_codebooks(8))
    scale = torch.tensor(3.0 / 13888)
    clean = matmul(encode(x, w.spec, w.codebooks, scale if static else absmax_row_scale(x)), w)
    x[2, 130] = bad
    out = matmul(encode(x, w.spec, w.codebooks, scale if static else absmax_row_scale(x)), w)
    assert out[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], clean[others])


def test_tensor_scales_are_applied_one_at_a_time():
    """Their product, 1e-46, underflows; the result, about 1e-38, does not."""
    product, tiny = torch.tensor([[1e8]]), torch.tensor([[1e-23]])
    assert scale_product(product, tiny, tiny[0, 0], None).item() == pytest.approx(1e-38, rel=1e-5, abs=0)


def test_operands_must_agree_in_k():
    a, _ = operands(FormatSpec(8, 64), 100, NO_ZERO)
    _, w = operands(FormatSpec(8, 64), 101, NO_ZERO)
    with pytest.raises(ValueError, match="a has K = 100 and w has K = 101: they must agree"):
        matmul(a, w)


@pytest.mark.parametrize("n", [1, 5])
def test_a_weight_with_row_scales_is_refused(n):
    """[N, 1] would broadcast along the wrong dimension of the product, silently where M = N."""
    a, _ = operands(FormatSpec(8, 64), 100, NO_ZERO)
    x = torch.from_numpy(matrix("normal", n, 100, seed=1))
    w = encode(x, FormatSpec(8, 64), int8(NO_ZERO), absmax_row_scale(x))
    with pytest.raises(ValueError, match=rf"w has a tensor scale of shape \[{n}, 1\]"):
        matmul(a, w)
