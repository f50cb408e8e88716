"""What GPUs run, on the CPU: whole models with everything fused, against those with nothing fused.

The ops that it is made of have default implementations, which run the CPU's core.
"""

from __future__ import annotations

import logging

import pytest
import torch

import lobcq_fx
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.passes.annotate_values import AnnotateValues
from tests.families import VOCABULARY, own_causal_lm
from tests.passes.graphs import aten, lobcq, nodes, targets
from tests.sweeps import sweep

LAYOUT = weight_layout(torch.device("cpu"))
pytestmark = pytest.mark.skipif(LAYOUT is None, reason="the CPU core was not built, or is switched off")

GPU = torch.device("cuda")
op = lobcq.linear_prepacked

FUSED = {
    "llama": {op.rms_norm: 4, op.residual: 2, op.silu_mul: 2},
    "gemma2": {op.rms_norm: 4, op.default: 4},
    "olmo2": {op.default: 3, op.silu_mul: 1},
    "gpt2": {op.layer_norm: 4, op.residual: 4},
    "gpt-neox": {op.layer_norm: 2, op.default: 1, op.residual: 1},
    "falcon": {op.layer_norm: 1, op.default: 2},
    "bloom": {op.layer_norm: 4, op.residual: 4},
}
"""Of their one or two layers, in fp32; other families are as one of these."""

EVERY_FUSED = sweep(FUSED, ["llama", "gemma2", "gpt2", "gpt-neox"])


def lowered(q, device=GPU) -> tuple:
    """q on graphs for GPUs; what was refused."""
    q._restore()
    return q._lower(LAYOUT, device)


@torch.no_grad()
@pytest.mark.parametrize("family", EVERY_FUSED)
def test_the_same_tokens_are_written(family):
    q = own_causal_lm(family)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected, logits = q.generate(ids, **settings), q(ids, attention_mask=mask).logits
    lowered(q)
    assert any(overload in targets(q.graph_module) for overload in (op.rms_norm, op.layer_norm, op.silu_mul))
    actual = q(ids, attention_mask=mask).logits
    assert (actual - logits)[mask.bool()].abs().median() < 1e-5 * logits.std()
    assert torch.equal(q.generate(ids, **settings), expected)


@pytest.mark.parametrize("family", EVERY_FUSED)
def test_what_is_fused(family):
    q = own_causal_lm(family)
    lowered(q)
    overloads = [getattr(op, name) for name in op.overloads()]
    found = {overload: len(nodes(q.graph_module, overload)) for overload in overloads}
    assert {overload: count for overload, count in found.items() if count} == FUSED[family]


def test_refusals_are_returned_and_logged(caplog):
    q = own_causal_lm("gpt-neox")
    with caplog.at_level(logging.INFO, logger="lobcq_fx.passes.order"):
        refusals = lowered(q)
    wanted = "fuse_activation_encode: gpt_neox.layers.0.mlp.dense_4h_to_h: gelu is not fused, silu(gate) * up is"
    assert wanted in [str(refusal) for refusal in refusals]
    assert wanted in caplog.text


def test_the_cpu_fuses_nothing_and_does_not_repeat_heads():
    q = own_causal_lm("llama")
    assert lowered(q, torch.device("cpu")) == ()
    assert {target for target in targets(q.graph_module) if "linear_prepacked" in str(target)} == {op.default}
    (first, _) = nodes(q.graph_module, torch.ops.lobcq.attention.float_states)
    assert first.args[5] is True  # enable_gqa


@torch.no_grad()
@pytest.mark.parametrize("family", sweep(["llama", "gpt2"], ["llama"]))
def test_it_compiles_whole(family):
    q = own_causal_lm(family)
    lowered(q)
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend="aot_eager")
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(compiled(ids).logits, q(ids).logits, rtol=1e-4, atol=1e-4)


def without_guards(graph_module):
    """What it calls, but for what only graphs of files have."""
    calls = graph_module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    guards = {part for call in calls for part in (call.args[1], call.args[1].args[3])}
    assert [part.target for part in guards].count(aten.narrow.default) == len(calls)
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function" and node not in guards]


@torch.no_grad()
@pytest.mark.parametrize("family", sweep(["llama", "gpt2", "gemma2"], ["llama", "gpt2"]))
def test_a_loaded_model_is_lowered_as_the_one_that_was_traced(family, tmp_path, monkeypatch):
    """Both graphs of it. Files hold no metadata: it is made while the weights are as they were stored."""
    traced = own_causal_lm(family, torch.bfloat16)
    traced.save_pretrained(tmp_path)
    loaded = lobcq_fx.load(tmp_path)
    on_the_cpu = AnnotateValues(torch.device("cpu"))
    monkeypatch.setattr("lobcq_fx.passes.order.AnnotateValues", lambda _: on_the_cpu)
    lowered(traced)
    lowered(loaded)
    assert list(loaded.graphs) == list(traced.graphs) == ["main", "static_cache"]
    for name in loaded.graphs:
        one, other = (q.graphs[name].graph_module for q in (loaded, traced))
        assert without_guards(one) == targets(other)
        assert any(overload in targets(one) for overload in (op.rms_norm, op.layer_norm))
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(ids).logits, traced(ids).logits)
    caches = [q.static_cache(16) for q in (loaded, traced)]
    assert torch.equal(loaded(ids, past_key_values=caches[0]).logits, traced(ids, past_key_values=caches[1]).logits)
