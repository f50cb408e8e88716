"""Which attentions become GroupQueryAttention, and which stay, with a reason."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
import torch

import lobcq_fx
from lobcq_fx.export.attention import UseGroupQueryAttention
from lobcq_fx.export.stored_module import stored_module
from lobcq_fx.passes.group_query_heads import GroupQueryHeads
from tests.export.sessions import Session
from tests.families import causal_lm
from tests.passes.graphs import assert_unchanged

aten = torch.ops.aten


def use_group_query_attention(graph_module, calling):
    """How many attentions were fused, and why others were not. A second run finds nothing more."""
    GroupQueryHeads()(graph_module)
    before = len(list(attentions(graph_module)))
    result = UseGroupQueryAttention(calling)(graph_module)
    fused = before - len(list(attentions(graph_module)))
    assert result.modified == bool(fused)
    again = assert_unchanged(UseGroupQueryAttention(calling), graph_module)
    assert again.refusals == result.refusals
    return fused, tuple(refusal.reason for refusal in result.refusals)


def attentions(graph_module):
    return graph_module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)


@pytest.fixture(scope="module")
def gpt_neox():
    return lobcq_fx.quantize(causal_lm("gpt-neox", num_hidden_layers=2), static_cache=False)


def test_narrow_heads_stay(exported_lm):
    q = exported_lm("llama").q
    graph_module = stored_module(q)
    fused, refused = use_group_query_attention(graph_module, q.calling)
    assert (fused, len(refused), len(attentions(graph_module))) == (0, 1, 1)
    assert "its heads are 18 and 18 wide" in refused[0]


def test_keys_and_values_of_other_widths_stay(gpt_neox):
    graph_module = stored_module(gpt_neox)
    heads = tuple((count, key, 2 * value) for count, key, value in gpt_neox.calling.cache_heads)
    fused, refused = use_group_query_attention(graph_module, dataclasses.replace(gpt_neox.calling, cache_heads=heads))
    assert fused == 0
    assert "its heads are 16 and 32 wide" in refused[0]


def test_what_is_no_growing_cache_stays(gpt_neox):
    for change, reason in (
        (lambda node: node.update_arg(3, None), "no mask of its own"),
        (lambda node: node.args[1].update_arg(1, 1), "not a cache with new ones appended"),
        (lambda node: node.args[1].update_arg(0, node.args[1].args[0][::-1]), "not a cache with new ones appended"),
    ):
        graph_module = stored_module(gpt_neox)
        assert len(attentions(graph_module)) == 2
        change(attentions(graph_module)[0])
        fused, refused = use_group_query_attention(graph_module, gpt_neox.calling)
        assert fused == 1
        assert reason in refused[0]


@torch.no_grad()
def test_fused_equals_unfused(exported_lm):
    """A prompt padded on the left, then a token; and several tokens after a cache, which the fused takes one by one."""
    both = exported_lm("gpt-neox"), exported_lm("gpt-neox", fuse=False)
    assert [one.summary.fused_attentions for one in both] == [1, 0]
    assert [one.summary.nodes.get("com.microsoft::GroupQueryAttention", 0) for one in both] == [1, 0]
    fused, plain = (Session(one.folder) for one in both)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = torch.arange(14).view(2, 7) + 5
    cache: dict[str, torch.Tensor] = {}
    for start, stop in ((0, 6), (6, 7)):
        call = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop].contiguous()}
        call["attention_mask"] = mask[:, :stop].contiguous()
        one, other = fused(**call, **cache), plain(**call, **cache)
        real = mask[:, start:stop].bool()
        torch.testing.assert_close(one["logits"][real], other["logits"][real], rtol=1e-4, atol=1e-5)
        cache = {name.replace("present.", "past_key_values."): x for name, x in other.items() if name != "logits"}
    one_sequence = {name: value[1:, :, :5].contiguous() for name, value in cache.items()}
    call = {"input_ids": ids[1:, 5:], "position_ids": positions[1:, 5:].contiguous(), "attention_mask": mask[1:]}
    torch.testing.assert_close(
        fused(**call, **one_sequence)["logits"], plain(**call, **one_sequence)["logits"], rtol=1e-4, atol=1e-5
    )


def test_numbers_of_heads_that_a_reshape_leaves_to_be_computed(exported_lm):
    """GPT-2's: the exported model is compared with torch, as every one is."""
    assert exported_lm("gpt2", mode="w4a16", target="matmulnbits").summary.fused_attentions == 1


def test_a_fused_graph_is_read_by_the_checker(exported_lm):
    """ONNX Runtime's own norms lie in ONNX's domain, where the checker knows none."""
    exported = exported_lm("llama")
    summary = exported.summary
    assert "SimplifiedLayerNormalization" not in summary.nodes
    assert summary.nodes["com.microsoft::SkipSimplifiedLayerNormalization"] > 0
    onnx.checker.check_model(str(exported.folder / "model.onnx"), full_check=True)
