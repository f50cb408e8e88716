"""Attention over rows of bytes: where it is fused, to what result, and near misses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lobcq_fx.cache_format import CacheFormat
from lobcq_fx.format import FormatSpec
from lobcq_fx.passes.fuse_cached_attention import FuseCachedAttention
from lobcq_fx.passes.group_query_heads import GroupQueryHeads
from lobcq_fx.passes.guard_attention import GuardAttention
from lobcq_fx.passes.quantize_cache import QuantizeCache
from lobcq_fx.tracing.trace import trace_module
from tests.families import quantized_causal_lm
from tests.passes.graphs import assert_unchanged, aten, lobcq, nodes, run, values
from tests.passes.test_group_query_heads import repeat_kv
from tests.sweeps import sweep

ATTENTION = aten.scaled_dot_product_attention.default
HEADS = ((2, 32, 32),)


class Attention(nn.Module):
    """Two key and value heads, which `read` makes ready for eight query heads."""

    def __init__(self, read=lambda keys, values: (repeat_kv(keys, 4), repeat_kv(values, 4)), **settings):
        super().__init__()
        self.read, self.settings = read, settings

    def forward(self, query, x, mask, key, value):
        assert key.shape[1] == value.shape[1] == x.shape[1] == 2  # known in the graph, as a model's heads are
        keys, values = torch.cat((key, x), -2), torch.cat((value, -x), -2)
        settings = {"attn_mask": mask, **self.settings}
        return nn.functional.scaled_dot_product_attention(query, *self.read(keys, values), **settings), keys, values


def operands(batch=2, past=5):
    mask = values(batch, 1, 3, past + 3, seed=4) > -1
    mask[..., 0] = True
    states = (values(batch, 2, past, 32, seed=seed) for seed in (2, 3))
    return values(batch, 8, 3, 32), values(batch, 2, 3, 32, seed=5), mask, *states


def with_rows(model, rotate_keys=True):
    """The graph module after the passes before, and its inputs' constants."""
    graph_module = trace_module(model, operands()).graph_module
    GroupQueryHeads()(graph_module)
    quantize_cache = QuantizeCache(CacheFormat(FormatSpec(), rotate_keys), HEADS, torch.float32)
    assert quantize_cache(graph_module).modified
    return graph_module, quantize_cache.constants.values()


def inputs(constants, *sizes):
    query, x, mask, *states = operands(*sizes)
    codebooks = next(iter(constants))
    rows = (lobcq.quantize_states(state, codebooks, 32) for state in states)
    return query, x, mask, *rows, *constants


@pytest.mark.parametrize("rotate_keys", [False, True])
@pytest.mark.parametrize("guarded", [False, True])
def test_attention_reads_rows(rotate_keys, guarded):
    graph_module, constants = with_rows(Attention(scale=0.3), rotate_keys)
    if guarded:  # as in a model from a file
        for node in graph_module.graph.nodes:
            node.meta.pop("val", None)
        assert GuardAttention()(graph_module).modified
    sizes = ((2, 5), (3, 0), (4, 9))
    expected = [run(graph_module, *inputs(constants, *one)) for one in sizes]
    assert FuseCachedAttention()(graph_module).modified
    assert not nodes(graph_module, ATTENTION)
    assert not nodes(graph_module, lobcq.dequantize_states.default)
    (attention,) = nodes(graph_module, lobcq.attention.default)
    assert attention.args[-2:] == (0.3, False)
    for one, before in zip(sizes, expected, strict=True):
        for actual, wanted in zip(run(graph_module, *inputs(constants, *one)), before, strict=True):
            torch.testing.assert_close(actual, wanted)
    if not guarded:
        described = attention.meta["val"]
        assert (described.dtype, described.shape[1], described.shape[3]) == (torch.float32, 8, 32)
    assert not FuseCachedAttention()(graph_module).modified


def test_without_a_scale_it_is_that_of_the_width():
    graph_module, constants = with_rows(Attention())
    expected = run(graph_module, *inputs(constants))[0]
    assert FuseCachedAttention()(graph_module).modified
    torch.testing.assert_close(run(graph_module, *inputs(constants))[0], expected)


def test_it_multiplies_integers_where_it_is_told_to():
    graph_module, constants = with_rows(Attention())
    expected = run(graph_module, *inputs(constants))[0]
    assert FuseCachedAttention(in_int8=True)(graph_module).modified
    (attention,) = nodes(graph_module, lobcq.attention.default)
    assert attention.args[-1] is True
    error = run(graph_module, *inputs(constants))[0] - expected
    assert 0 < error.norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Attention(lambda keys, values: (repeat_kv(keys, 4) * 2, repeat_kv(values, 4))), "other keys or values"),
        (Attention(lambda keys, values: (repeat_kv(keys, 4), repeat_kv(values.relu(), 4))), "other keys or values"),
        (Attention(lambda keys, values: (repeat_kv(keys[:, :1], 8), repeat_kv(values[:, :1], 8))), "other keys or"),
        (Attention(attn_mask=None, is_causal=True), "a causal mask of its own"),
    ],
    ids=["scaled keys", "changed values", "one head of two", "causal"],
)
def test_other_attention_stays(model, reason):
    graph_module, _ = with_rows(model)
    assert nodes(graph_module, ATTENTION)
    (refusal,) = FuseCachedAttention()(graph_module).refusals
    assert reason in refusal.reason
    assert_unchanged(FuseCachedAttention(), graph_module)


@pytest.mark.parametrize(
    "family", sweep(["llama", "mistral", "gemma3", "gpt2", "opt", "phi3"], ["llama", "gemma3", "gpt2"])
)
def test_it_fires_in_models(family):
    q = quantized_causal_lm(family)[1]
    graph_module = q._for_quantized_cache(CacheFormat()).graph_module
    layers = len(q.calling.cache_heads)
    assert len(nodes(graph_module, lobcq.attention.default)) == layers
    assert not nodes(graph_module, lobcq.dequantize_states.default)
