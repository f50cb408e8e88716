"""What runs between linears as one call: the operators that models spell out, bit for bit; attention of one query."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import lobcq_fx.ops
from lobcq_fx.errors import LobcqError, OperandError
from lobcq_fx.kernels.bind import bind_cpu_core
from tests.sweeps import crossed

lobcq = torch.ops.lobcq
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

needs_core = pytest.mark.skipif(not bind_cpu_core(), reason="the CPU core was not built, or is switched off")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bits, dtype, and the order in memory, of which a dimension of size 1 says nothing."""
    assert torch.equal(actual, expected)
    assert actual.dtype == expected.dtype
    assert strides(actual) == strides(expected)


def strides(x: torch.Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


@pytest.mark.parametrize("rms_norm", [lobcq.rms_norm, lobcq_fx.ops.rms_norm])
@pytest.mark.parametrize(("dtype", "weight_dtype"), crossed(FLOATS, [torch.float32, torch.bfloat16]))
def test_rms_norm_is_what_llama_spells_out(rms_norm, dtype, weight_dtype):
    for shape in ((1, 1, 576), (2, 37, 100), (1, 300, 33), (5, 7), (0, 4)):
        x, weight = (randn(*shape) * 3).to(dtype), randn(shape[-1], seed=1).to(weight_dtype)
        wide = x.to(torch.float32)
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        assert_same(rms_norm(x, weight, 1e-5, dtype), weight * normalized.to(dtype))
        assert_same(rms_norm(x, weight, 1e-5, torch.float32), weight * normalized)


@pytest.mark.parametrize("rotate_half", [lobcq.rotate_half, lobcq_fx.ops.rotate_half])
@pytest.mark.parametrize(("dtype", "factor_dtype"), crossed(FLOATS, [torch.float32, torch.bfloat16]))
def test_rotate_half_is_what_llama_spells_out(rotate_half, dtype, factor_dtype):
    for batch, heads, tokens, width, half in (
        (1, 9, 1, 64, 32),
        (2, 3, 17, 18, 9),
        (2, 4, 100, 16, 5),
        (1, 2, 0, 8, 4),
    ):
        one = randn(batch, tokens, heads, width).to(dtype)
        cos, sin = randn(batch, 1, tokens, width, seed=1), randn(1, 1, tokens, width, seed=2)
        cos, sin = cos.to(factor_dtype), sin.to(factor_dtype)
        for x in (one.transpose(1, 2), one.transpose(1, 2).contiguous()):
            expected = x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
            assert_same(rotate_half(x, cos, sin, half), expected)


@needs_core
@pytest.mark.parametrize("queries", [1, 2, 8, 40])
@pytest.mark.parametrize("heads", [2, 8])
def test_attention_is_torch_s_whether_there_is_one_query_or_more(queries, heads):
    query, key, value = randn(2, 8, queries, 24), randn(2, heads, 60, 24, seed=1), randn(2, heads, 60, 40, seed=2)
    mask = randn(2, 1, queries, 60, seed=3) > -1
    for given in (None, mask, mask.expand(2, 8, queries, 60), torch.where(mask, 0.1, -1e30)):
        for scale in (None, 0.3):
            actual = lobcq.attention.float_states(query, key, value, given, scale, True)
            expected = scaled_dot_product_attention(query, key, value, given, scale=scale, enable_gqa=True)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            assert actual.transpose(1, 2).is_contiguous()
    assert_same(
        lobcq.attention.float_states(query, key, value, mask, None, True).isnan(),
        lobcq_fx.ops.attention_float_states(query, key, value, mask, None, True).isnan(),
    )


@needs_core
def test_attention_without_tokens_and_with_wide_heads_is_torch_s():
    for tokens, width in ((0, 16), (3, 1100)):
        query, key = randn(1, 2, 1, width), randn(1, 2, tokens, width, seed=1)
        actual = lobcq.attention.float_states(query, key, key, None, None, False)
        torch.testing.assert_close(actual, scaled_dot_product_attention(query, key, key), equal_nan=True)


def test_under_opcheck():
    weight, cos = randn(32, seed=1), randn(1, 1, 5, 16, seed=1)
    x = randn(2, 5, 3, 16).transpose(1, 2)
    mask = randn(2, 1, 5, 5, seed=2) > 0
    for op, arguments in (
        (lobcq.rms_norm.default, (randn(2, 5, 32), weight, 1e-6, torch.bfloat16)),
        (lobcq.rotate_half.default, (x, cos, cos, 8)),
        (lobcq.attention.float_states, (x, x, x, mask, None, False)),
        (lobcq.attention.float_states, (x[:, :, :1], x[:, :1], x[:, :1], None, 0.5, True)),
    ):
        torch.library.opcheck(op, arguments, test_utils=OPCHECKS)


def test_what_they_refuse():
    x = randn(1, 6, 2, 16)
    refused = (LobcqError, OperandError, RuntimeError)
    for attention in (lobcq.attention.float_states, lobcq_fx.ops.attention_float_states):
        with pytest.raises(refused, match=r"4 heads, .*query"):
            attention(x, x[:, :4], x[:, :4], None, None, True)
        with pytest.raises(refused, match=r"2 heads, .*query"):
            attention(x, x[:, :2], x[:, :2], None, None, False)
        with pytest.raises(refused, match="no gradient"):
            attention(x.clone().requires_grad_(), x, x, None, None, False)
    for rotate_half in (lobcq.rotate_half, lobcq_fx.ops.rotate_half):
        with pytest.raises(refused, match="half is 17 of 16 columns"):
            rotate_half(x, x, x, 17)
        with pytest.raises(refused, match="no gradient"):
            rotate_half(x.clone().requires_grad_(), x, x, 8)
    for rms_norm in (lobcq.rms_norm, lobcq_fx.ops.rms_norm):
        with pytest.raises(refused, match="no gradient"):
            rms_norm(x, x[0, 0, 0].clone().requires_grad_(), 1e-5, torch.float32)
