"""Gated activations on the way into the encoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.graph.prepacked_calls import NO_METADATA
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.ops.prologues import silu_mul
from lobcq_fx.passes.fuse_activation_encode import FuseActivationEncode
from tests.families import VOCABULARY, own_causal_lm
from tests.passes.graphs import (
    assert_metadata,
    assert_unchanged,
    aten,
    linear,
    lobcq,
    nodes,
    prepacked_graph,
    run,
    targets,
    values,
)
from tests.sweeps import sweep

pytestmark = pytest.mark.skipif(weight_layout(torch.device("cpu")) is None, reason="the CPU core was not built")

silu, gelu = nn.functional.silu, nn.functional.gelu


def members():
    return {"down": linear(48, 64), "other": linear(17, 64, bias=False, seed=1)}


def fused(function, **options):
    graph_module = prepacked_graph(function, **options)
    result = FuseActivationEncode()(graph_module)
    assert result.modified
    assert not result.refusals
    assert_unchanged(FuseActivationEncode(), graph_module)
    assert not {aten.silu.default, aten.mul.Tensor} & set(targets(graph_module))
    return graph_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate_first", [True, False])
def test_the_encoded_product_is_that_of_its_rule(dtype, gate_first):
    def block(m, x):
        gate, up = x, x.cos()
        product = silu(gate) * up if gate_first else up * silu(gate)
        return m.down(product), m.other(product)

    graph_module = fused(block, dtype=dtype, **members())
    assert len(nodes(graph_module, lobcq.linear_prepacked.silu_mul)) == 1
    linears = prepacked_graph(lambda m, x: (m.down(x), m.other(x)), dtype=dtype, **members())
    for shape in [(2, 3, 64), (1, 1, 64), (5, 9, 64)]:
        x = 2 * values(*shape).to(dtype)
        with torch.no_grad():
            results, expected = graph_module(x), linears(silu_mul(x, x.cos()))
        for one, other in zip(results, expected, strict=True):
            assert torch.equal(one, other)
        assert_metadata(graph_module, x)


def test_a_product_that_is_rotated():
    options = {"rotated": ("down", "other"), **members()}
    graph_module = fused(lambda m, x: (lambda y: (m.down(y), m.other(y)))(silu(x) * x.cos()), **options)
    assert [call.args[-1] for call in nodes(graph_module, lobcq.linear_prepacked.silu_mul)] == [True]
    linears = prepacked_graph(lambda m, x: (m.down(x), m.other(x)), **options)
    x = values(5, 9, 64)
    with torch.no_grad():
        for one, other in zip(graph_module(x), linears(silu_mul(x, x.cos())), strict=True):
            assert torch.equal(one, other)


def test_halves_of_one_tensor_and_rows_that_a_view_merges():
    """Phi-3 multiplies once for gate and up."""

    def block(m, x):
        gate, up = x.repeat(1, 1, 2).sin().chunk(2, dim=-1)
        return m.down((silu(gate) * up).view(-1, 64))

    graph_module = fused(block, **members())
    linears = prepacked_graph(lambda m, x: m.down(x), **members())
    x = values(2, 3, 64)
    assert torch.equal(run(graph_module, x), run(linears, silu_mul(x.sin(), x.sin())).view(-1, 48))
    assert_metadata(graph_module, x)


def write_to_up(m, x):
    up = x + 1
    product = silu(x) * up
    up.add_(1)
    return m.down(product) + up.sum()


def share_the_gate(m, x):
    gate = silu(x)
    return m.down(gate * x.cos()) + gate.sum()


def share_the_product(m, x):
    product = silu(x) * x.cos()
    return m.down(product), product * 2


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda m, x: m.down(gelu(x) * x.cos()), "gelu(gate) * up is not fused, silu(gate) * up is"),
        (lambda m, x: m.down(gelu(x)), "gelu is not fused, silu(gate) * up is"),
        (lambda m, x: m.down(torch.relu(x).square()), "square is not fused, silu(gate) * up is"),
        (lambda m, x: m.down(silu(x)), "silu is fused with a factor alone: silu(gate) * up"),
        (lambda m, x: m.down(silu(x) * 2), "gate and up are not of one shape and dtype"),
        (lambda m, x: m.down(silu(x) * m.down.bias[:1]), "gate and up are not of one shape and dtype"),
        (write_to_up, "something writes to gate or up before the linear runs"),
        (share_the_gate, "sum_1 reads the activation too"),
        (share_the_product, "mul_1 reads the activation too"),
    ],
    ids=str,
)
def test_near_misses_stay_and_say_why(block, reason):
    graph_module = prepacked_graph(block, **members())
    result = assert_unchanged(FuseActivationEncode(), graph_module)
    assert [(refusal.layer, refusal.reason) for refusal in result.refusals] == [("down", reason)]


def test_what_is_no_activation_is_not_worth_a_word():
    graph_module = prepacked_graph(lambda m, x: m.down(x.sin() * x.cos()), **members())
    result = assert_unchanged(FuseActivationEncode(), graph_module)
    assert not result.refusals


def test_a_graph_without_metadata_stays():
    graph_module = prepacked_graph(lambda m, x: m.down(silu(x) * x.cos()), **members())
    for node in graph_module.graph.nodes:
        node.meta.clear()
    result = assert_unchanged(FuseActivationEncode(), graph_module)
    assert [refusal.reason for refusal in result.refusals] == [NO_METADATA]


def test_float_activations_are_not_encoded():
    config = lobcq_fx.LobcqConfig(mode="w4a16")
    assert_unchanged(
        FuseActivationEncode(), prepacked_graph(lambda m, x: m.down(silu(x) * x.cos()), config=config, **members())
    )


@torch.no_grad()
@pytest.mark.parametrize("family", sweep(["llama", "phi3"], ["llama"]))
def test_a_whole_model(family):
    q = own_causal_lm(family, torch.bfloat16)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = q(ids).logits
    assert FuseActivationEncode()(q.graph_module).modified
    assert len(nodes(q.graph_module, lobcq.linear_prepacked.silu_mul)) == q.config.num_hidden_layers
    assert aten.silu.default not in targets(q.graph_module)
    torch.testing.assert_close(q(ids).logits, expected, rtol=0.05, atol=0.05)
