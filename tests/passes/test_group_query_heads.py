"""Grouped key and value heads: attention reads them unrepeated, with the same bits."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import lobcq_fx
from lobcq_fx.passes.group_query_heads import GroupQueryHeads
from lobcq_fx.tracing.trace import trace_module
from tests.families import own_causal_lm, quantized_causal_lm
from tests.passes.graphs import assert_metadata, assert_unchanged, aten, nodes, run, targets, values
from tests.sweeps import sweep

ATTENTION = aten.scaled_dot_product_attention.default


def repeat_kv(states, groups):
    """As transformers writes it."""
    batch, heads, length, width = states.shape
    states = states[:, :, None, :, :].expand(batch, heads, groups, length, width)
    return states.reshape(batch, heads * groups, length, width)


def interleave_wrongly(states, groups):
    """Head after head, then all again: query heads 0 and 1 read different heads."""
    batch, heads, length, width = states.shape
    return states[:, None].expand(batch, groups, heads, length, width).reshape(batch, heads * groups, length, width)


def split(states, heads):
    """[B, T, H * 16] -> [B, H, T, 16]"""
    return states.view(states.shape[0], -1, heads, 16).transpose(1, 2)


class Attention(nn.Module):
    """Two key and value heads."""

    def __init__(self, repeat_key=repeat_kv, repeat_value=repeat_kv, groups=4):
        super().__init__()
        self.repeat_key, self.repeat_value, self.groups = repeat_key, repeat_value, groups

    def forward(self, query, key, value, mask):
        query, key, value = split(query, 2 * self.groups), split(key, 2), split(value, 2)
        key, value = self.repeat_key(key, self.groups), self.repeat_value(value, self.groups)
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)


def operands(batch=2, length=3, past=5, groups=4):
    query = values(batch, length, 2 * groups * 16)
    key, value = (values(batch, past + length, 2 * 16, seed=seed) for seed in (2, 3))
    mask = values(batch, 1, length, past + length, seed=4) > -1
    mask[..., 0] = True
    return query, key, value, mask


def traced(model, arguments):
    return trace_module(model, arguments).graph_module


def test_repeated_heads_are_read_where_they_lie():
    model, graph_module = Attention(), traced(Attention(), operands())
    assert aten.expand.default in targets(graph_module)
    assert GroupQueryHeads()(graph_module).modified
    assert aten.reshape.default not in targets(graph_module)
    (attention,) = nodes(graph_module, ATTENTION)
    assert [node.target for node in attention.args[1:3]] == [aten.expand.default] * 2  # to their own sizes: no copy
    assert attention.kwargs["enable_gqa"]
    assert attention.kwargs["scale"] == 0.3
    for sizes in ((2, 3, 5), (3, 7, 0), (4, 2, 31)):
        arguments = operands(*sizes)
        assert torch.equal(run(graph_module, *arguments), model(*arguments))
        assert_metadata(graph_module, *arguments)
    assert not GroupQueryHeads()(graph_module).modified


@pytest.mark.parametrize(
    "model",
    [
        Attention(interleave_wrongly, interleave_wrongly),
        Attention(repeat_value=interleave_wrongly),
        Attention(
            lambda states, groups: states.repeat(1, groups, 1, 1), lambda states, groups: states.repeat(1, groups, 1, 1)
        ),
    ],
    ids=["other heads", "value repeated otherwise", "no expand"],
)
def test_other_repetitions_stay(model):
    graph_module = traced(model, operands())
    assert nodes(graph_module, ATTENTION)
    assert_unchanged(GroupQueryHeads(), graph_module)


def test_an_attention_without_groups_stays():
    model = Attention(lambda states, groups: states, lambda states, groups: states, groups=1)
    graph_module = traced(model, operands(groups=1))
    assert nodes(graph_module, ATTENTION)
    assert_unchanged(GroupQueryHeads(), graph_module)


def test_a_repeated_tensor_that_is_read_elsewhere_stays_for_that_reader():
    class Reads(Attention):
        def forward(self, query, key, value, mask):
            return super().forward(query, key, value, mask) + repeat_kv(split(value, 2), self.groups)[:, :, :1]

    model, arguments = Reads(), operands()
    graph_module = traced(model, arguments)
    assert GroupQueryHeads()(graph_module).modified
    assert aten.reshape.default in targets(graph_module)
    torch.testing.assert_close(run(graph_module, *arguments), model(*arguments))


# Qwen3 repeats heads as Llama does.
@pytest.mark.parametrize("family", sweep(["llama", "mistral", "qwen3"], ["llama", "mistral"]))
def test_a_quantized_model_runs_it_on_the_cpu_and_stores_what_was_traced(family):
    q = quantized_causal_lm(family)[1]
    stored = [node for node in q.stored_graph.nodes if node.target is ATTENTION]
    running = nodes(q.graph_module, ATTENTION)
    assert stored
    assert not any(node.kwargs.get("enable_gqa") for node in stored)
    grouped = q.stored_graph is not q.graph_module.graph  # the core is built, so that the CPU has a graph of its own
    assert all(bool(node.kwargs.get("enable_gqa")) == grouped for node in running)


def test_a_length_that_is_broadcast_stays_right():
    def one_for_all(states, groups):
        batch, heads, _, width = states.shape
        states = states[:, :, :1]  # its value for every position
        return states[:, :, None].expand(batch, heads, groups, 8, width).reshape(batch, heads * groups, 8, width)

    model, arguments = Attention(repeat_value=one_for_all), operands()
    graph_module = traced(model, arguments)
    assert GroupQueryHeads()(graph_module).modified
    torch.testing.assert_close(run(graph_module, *arguments), model(*arguments))


def test_a_loaded_model_runs_it_too(tmp_path):
    q = quantized_causal_lm("llama")[1]
    q.save_pretrained(tmp_path / "saved")
    loaded = lobcq_fx.load(tmp_path / "saved")
    of = [[node.kwargs for node in nodes(one.graph_module, ATTENTION)] for one in (q, loaded)]
    assert of[0] == of[1]


@torch.no_grad()
def test_padding_and_a_cache_change_nothing():
    q = own_causal_lm("llama")
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    cache = transformers.DynamicCache()
    q(tokens[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    actual = q(tokens[:, 6:], attention_mask=mask, past_key_values=cache).logits
    q._restore()
    assert torch.equal(q(tokens, attention_mask=mask).logits[:, 6:].argmax(-1), actual.argmax(-1))
