"""`lobcq::attention` against torch's own over decoded keys and values."""

from __future__ import annotations

import pytest
import torch

import lobcq_fx.ops
from lobcq_fx.errors import OperandError
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.kernels.bind import bind_cpu_core

IMPLEMENTATIONS = {"default": lobcq_fx.ops.attention, "bound": torch.ops.lobcq.attention}
bind_cpu_core()


def call(batch=2, heads=2, groups=3, queries=5, tokens=70, width=64, value_width=64, spec=FormatSpec(), seed=0):  # noqa: B008
    generator = torch.Generator().manual_seed(seed)

    def states(heads, tokens, width):
        return torch.randn(batch, heads, tokens, width, generator=generator)

    codebooks = universal_codebooks(spec.num_codebooks)
    keys = torch.ops.lobcq.quantize_states(3 * states(heads, tokens, width), codebooks, spec.array_size)
    values = torch.ops.lobcq.quantize_states(states(heads, tokens, value_width), codebooks, spec.array_size)
    sizes = (heads, value_width, spec.array_size, spec.array_size, width**-0.5)
    return states(heads * groups, queries, width), keys, values, codebooks, sizes


def expected(query, keys, values, codebooks, mask, sizes):
    heads, value_width, array_size, _, scale = sizes
    dequantize = torch.ops.lobcq.dequantize_states
    key = dequantize(keys, codebooks, heads, query.shape[-1], array_size, torch.float32).double()
    value = dequantize(values, codebooks, heads, value_width, array_size, torch.float32).double()
    key, value = (one.repeat_interleave(query.shape[1] // heads, dim=1) for one in (key, value))
    mask = None if mask is None else mask if mask.dtype == torch.bool else mask.double()
    return torch.nn.functional.scaled_dot_product_attention(query.double(), key, value, attn_mask=mask, scale=scale)


def assert_right(implementation, query, keys, values, codebooks, mask, sizes, rounding=0.03):
    out = IMPLEMENTATIONS[implementation](query, keys, values, codebooks, mask, *sizes)
    assert (out.dtype, out.is_contiguous()) == (query.dtype, True)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[query.dtype]
    wanted = expected(query, keys, values, codebooks, mask, sizes)
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    in_int8 = IMPLEMENTATIONS[implementation](query, keys, values, codebooks, mask, *sizes, in_int8=True)
    assert (in_int8.dtype, in_int8.is_contiguous()) == (query.dtype, True)
    assert torch.equal(in_int8, IMPLEMENTATIONS["default"](query, keys, values, codebooks, mask, *sizes, in_int8=True))
    # Of queries and weights in 8 bits, relative to all values: a wrong scale or entry is off by far more.
    assert (in_int8.double() - wanted).norm() <= rounding * wanted.norm()


def masks(batch, heads, queries, tokens):
    generator = torch.Generator().manual_seed(7)
    some = torch.rand(batch, heads, queries, tokens, generator=generator) > 0.4
    causal = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)[None, None]
    padded = causal & (torch.arange(tokens) >= torch.tensor([[0], [9]])[:batch])[:, None, None]
    return {
        "none": None,
        "causal": causal,
        "padded": padded,
        "window": causal & ~causal.tril(-4),
        "of each head": some,
        "of a query": some[:, :1, :, :],
        "one for all": some[:1, :1, :1],
        "strided": some.mT.contiguous().mT,
        "added": torch.where(some, torch.randn(some.shape, generator=generator), -torch.inf),
        "added in bf16": torch.randn(batch, 1, queries, tokens, generator=generator).bfloat16(),
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", masks(1, 1, 1, 1))
def test_masks(implementation, name):
    *operands, sizes = call()
    assert_right(implementation, *operands, masks(2, 6, 5, 70)[name], sizes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 1, "tokens": 1},
        {"queries": 1, "tokens": 300, "groups": 1},
        {"queries": 40, "tokens": 64, "heads": 1, "groups": 4},
        {"width": 18, "value_width": 18, "spec": FormatSpec(8, 32)},
        {"width": 80, "value_width": 40, "spec": FormatSpec(2, 16)},
        {"width": 128, "value_width": 128, "spec": FormatSpec(16, 128)},
        {"width": 256, "value_width": 256, "spec": FormatSpec(1, 64)},
        {"width": 576, "value_width": 512, "queries": 2},
        {"batch": 0},
        {"queries": 0},
    ],
    ids=str,
)
def test_sizes(implementation, sizes):
    *operands, rest = call(**sizes)
    assert_right(implementation, *operands, None, rest)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_of_any_dtype_and_strides(implementation, dtype):
    query, *operands, sizes = call()
    query = query.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    assert not query.is_contiguous()
    assert_right(implementation, query, *operands, None, sizes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("in_int8", [False, True])
def test_a_query_that_looks_nowhere_gets_zeros(implementation, added, in_int8):
    *operands, sizes = call()
    sizes = (*sizes, in_int8)
    looks = torch.ones(2, 1, 5, 70, dtype=torch.bool)
    looks[1, :, 3] = False
    mask = torch.where(looks, 0.0, -torch.inf) if added else looks
    out = IMPLEMENTATIONS[implementation](*operands, mask, *sizes)
    assert not out[1, :, 3].any()
    everywhere = IMPLEMENTATIONS[implementation](*operands, None, *sizes)
    torch.testing.assert_close(out[0], everywhere[0])
    torch.testing.assert_close(out[1, :, :3], everywhere[1, :, :3])
    *empty, sizes = call(tokens=0)
    assert not IMPLEMENTATIONS[implementation](*empty, None, *sizes, in_int8).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_neither_overflow_nor_drown(implementation):
    query, *operands, sizes = call()
    assert_right(implementation, 40 * query, *operands, None, sizes, rounding=0.06)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("in_int8", [False, True])
def test_what_is_not_looked_at_may_be_nan(implementation, in_int8):
    """A key that is NaN, in a tile that the same queries look at otherwise; in integers a value, too."""
    query, keys, values, *operands, sizes = call()
    mask = torch.ones(2, 1, 5, 70, dtype=torch.bool)
    mask[..., 30] = False
    expected = IMPLEMENTATIONS[implementation](query, keys, values, *operands, mask, *sizes, in_int8)
    keys[:, 30, :4] = values[:, 30, :4] = torch.tensor([torch.nan]).view(torch.uint8)
    if not in_int8:
        values[:, 30] = 0
    assert torch.equal(IMPLEMENTATIONS[implementation](query, keys, values, *operands, mask, *sizes, in_int8), expected)
    out = IMPLEMENTATIONS[implementation](query, keys, values, *operands, None, *sizes, in_int8)
    assert out.isnan().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_heads_that_do_not_divide_the_query_s_are_refused(implementation):
    *operands, sizes = call(heads=2, groups=1)
    operands[0] = operands[0][:, :1]
    with pytest.raises((OperandError, RuntimeError), match="heads is 2, which does not divide the 1 of query"):
        IMPLEMENTATIONS[implementation](*operands, None, *sizes)
