"""Norms, rotations and attention as one call each: found by their structure, with the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.passes.attend_floats import AttendFloats
from lobcq_fx.passes.fuse_between_linears import FuseBetweenLinears
from tests.families import causal_lm, quantized_causal_lm
from tests.passes.graphs import Function, assert_metadata, aten, graph_of, lobcq, nodes, parameter, run, values
from tests.sweeps import sweep

RMS_NORM, ROTATE_HALF, ATTENTION = (
    lobcq.rms_norm.default, lobcq.rotate_half.default, lobcq.attention.float_states,
)  # fmt: skip


def rms_norm(m, x, *, cast=torch.float32, eps=1e-6, power=2, dim=-1):
    wide = x.to(torch.float32)
    return m.weight * (wide * torch.rsqrt(wide.pow(power).mean(dim, keepdim=True) + eps)).to(cast)


def gemma_norm(m, x):
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)) * (1.0 + m.weight.float())


def rotated(m, x, half=32):
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * m.cos[None, None] + turned * m.sin[None, None]


@pytest.mark.parametrize("norm", [rms_norm, gemma_norm])
def test_norms_are_one_call_with_the_same_bits(norm):
    model = Function(norm, weight=parameter(64))
    graph_module = graph_of(model)
    assert FuseBetweenLinears()(graph_module).modified
    assert len(nodes(graph_module, RMS_NORM)) == 1
    assert not nodes(graph_module, aten.rsqrt.default)
    for shape in ((2, 3, 64), (1, 1, 64), (5, 70, 64)):
        assert torch.equal(run(graph_module, values(*shape)), model(values(*shape)))
    assert_metadata(graph_module, values(2, 3, 64))
    assert not FuseBetweenLinears()(graph_module).modified


@pytest.mark.parametrize("half", [32, 20])
def test_rotations_are_one_call_with_the_same_bits(half):
    model = Function(lambda m, x: rotated(m, x, half), cos=parameter(7, 64), sin=parameter(7, 64, seed=1))
    graph_module = graph_of(model, values(2, 3, 7, 64))
    assert FuseBetweenLinears()(graph_module).modified
    (node,) = nodes(graph_module, ROTATE_HALF)
    assert node.args[3] == half
    for x in (values(2, 3, 7, 64), values(2, 7, 3, 64, seed=2).transpose(1, 2)):
        assert torch.equal(run(graph_module, x), model(x))
    assert_metadata(graph_module, values(2, 3, 7, 64))


OTHER = {
    "another power": lambda m, x: rms_norm(m, x, power=3),
    "another dimension": lambda m, x: rms_norm(m, x, dim=1),
    "a scale that is no vector": lambda m, x: m.weight[None, :, None, None] * rms_norm(m, x),
    "no rotation, but a swap": lambda m, x: x * m.cos + torch.cat((x[..., 32:], x[..., :32]), -1) * m.sin,
    "halves the wrong way round": lambda m, x: x * m.cos + torch.cat((x[..., :32], -x[..., 32:]), -1) * m.sin,
    "some columns left out": lambda m, x: x * m.cos + torch.cat((-x[..., 34:], x[..., :34]), -1)[..., :64] * m.sin[:64],
    "two tensors": lambda m, x: x * m.cos + torch.cat((-x[..., 32:], x.exp()[..., :32]), -1) * m.sin,
}


@pytest.mark.parametrize("other", OTHER)
def test_what_is_alike_but_none_stays_right(other):
    members = {"weight": parameter(64), "cos": parameter(64, seed=1), "sin": parameter(64, seed=2)}
    model = Function(OTHER[other], **members)
    x = values(2, 64, 5, 64)
    graph_module = graph_of(model, x)
    FuseBetweenLinears()(graph_module)
    torch.testing.assert_close(run(graph_module, x), model(x), rtol=0, atol=0, equal_nan=True)


class Attends(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, query, key, value, mask=None):
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **self.settings)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", [{}, {"scale": 0.3}, {"enable_gqa": True}])
def test_attention_of_four_dimensions_is_the_core_s(masked, settings):
    heads = 2 if "enable_gqa" in settings else 4
    operands = [values(2, 4, 1, 16), values(2, heads, 9, 16, seed=2), values(2, heads, 9, 16, seed=3)]
    operands += [values(2, 1, 1, 9, seed=4) > -1] if masked else []
    model = Attends(**settings)
    graph_module = graph_of(model, *operands)
    assert AttendFloats()(graph_module).modified
    assert len(nodes(graph_module, ATTENTION)) == 1
    torch.testing.assert_close(run(graph_module, *operands), model(*operands))
    assert_metadata(graph_module, *operands)


@pytest.mark.parametrize(("shape", "settings"), [((2, 9, 16), {}), ((2, 4, 9, 16), {"is_causal": True})])
def test_other_attention_stays(shape, settings):
    operands = [values(*shape, seed=seed) for seed in (1, 2, 3)]
    graph_module = graph_of(Attends(**settings), *operands)
    assert not AttendFloats()(graph_module).modified


# Phi-3's norms, rotations and attention are Llama's.
@pytest.mark.parametrize(
    "family", sweep(["llama", "qwen3", "gemma2", "phi3", "olmo2"], ["llama", "qwen3", "gemma2", "olmo2"])
)
def test_models_run_them_and_store_what_was_traced(family, tmp_path):
    layers = {"num_hidden_layers": 2 if family == "gemma2" else 1}  # its layers are of two kinds
    q = lobcq_fx.quantize(causal_lm(family, **layers), static_cache=False)
    if q.stored_graph is q.graph_module.graph:
        pytest.skip("the CPU core was not built, or is switched off")
    count = q.config.num_hidden_layers
    q.save_pretrained(tmp_path / "saved")
    loaded = lobcq_fx.load(tmp_path / "saved")
    for one in (q, loaded):
        found = [len(nodes(one.graph_module, target)) for target in (RMS_NORM, ROTATE_HALF, ATTENTION)]
        assert found[0] >= 2 * count + 1
        assert found[1] == 2 * count
        assert found[2] in (0, count)  # Gemma 2 caps its scores, and spells attention out
    assert not {RMS_NORM, ROTATE_HALF, ATTENTION} & {node.target for node in q.stored_graph.nodes}


def test_a_bf16_model_runs_them_too():
    q = quantized_causal_lm("llama", dtype=torch.bfloat16)[1]
    if q.stored_graph is q.graph_module.graph:
        pytest.skip("the CPU core was not built, or is switched off")
    assert [len(nodes(q.graph_module, target)) for target in (RMS_NORM, ROTATE_HALF, ATTENTION)] == [5, 4, 2]
