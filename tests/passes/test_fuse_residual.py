"""Residuals that are added where a linear's result is made: the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.graph.prepacked_calls import NO_METADATA
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.passes.fuse_activation_encode import FuseActivationEncode
from lobcq_fx.passes.fuse_residual import FuseResidual
from tests.families import CAUSAL_LMS, VOCABULARY, own_causal_lm
from tests.passes.graphs import (
    assert_metadata,
    assert_unchanged,
    aten,
    linear,
    lobcq,
    nodes,
    prepacked_graph,
    targets,
    values,
)

pytestmark = pytest.mark.skipif(weight_layout(torch.device("cpu")) is None, reason="the CPU core was not built")

op = lobcq.linear_prepacked
W4A16 = lobcq_fx.LobcqConfig(mode="w4a16")


def members():
    return {"down": linear(64, 64), "other": linear(64, 64, bias=False, seed=1)}


def assert_same_results(block, target, **options):
    """The pass fires, `target` is in the graph and sums are gone, and every output has the bits it had."""
    before, graph_module = prepacked_graph(block, **options), prepacked_graph(block, **options)
    result = FuseResidual()(graph_module)
    assert result.modified
    assert not result.refusals
    assert_unchanged(FuseResidual(), graph_module)
    assert len(nodes(graph_module, target)) == 1
    assert aten.add.Tensor not in targets(graph_module)
    for shape in [(2, 3, 64), (1, 1, 64), (5, 9, 64)]:
        x = values(*shape).to(options.get("dtype", torch.float32))
        with torch.no_grad():
            for actual, expected in zip(graph_module(x), before(x), strict=True):
                assert torch.equal(actual, expected)
        assert_metadata(graph_module, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [lambda m, x: x + m.down(x.sin()), lambda m, x: m.down(x.sin()) + x], ids=str)
@pytest.mark.parametrize(("config", "target"), [(None, op.residual), (W4A16, op.float_activation_residual)])
def test_a_residual(block, dtype, config, target):
    assert_same_results(block, target, dtype=dtype, config=config, **members())


def test_after_a_rotated_activation():
    assert_same_results(lambda m, x: (m.down(x) + x, m.other(x)), op.residual, rotated=("down", "other"), **members())


def test_one_of_two_siblings_and_both():
    assert_same_results(lambda m, x: (m.down(x) + x, m.other(x)), op.residual, **members())
    assert_same_results(lambda m, x: (m.down(x), m.other(x) + x), op.residual, **members())
    assert_same_results(lambda m, x: (m.down(x) + x, x + m.other(x)), op.residual, **members())


def test_through_views_and_dropouts_that_drop_nothing():
    """GPT-2's [B * T, N]."""

    def block(m, x):
        out = m.down(x.view(-1, 64)).view(x.shape)
        return nn.functional.dropout(out, 0.1, False) + x

    assert_same_results(block, op.residual, **members())


def test_after_a_gated_activation():
    def block(m, x):
        return m.down(nn.functional.silu(x) * x.cos()) + x

    before, graph_module = (prepacked_graph(block, **members()) for _ in range(2))
    FuseActivationEncode()(before)
    FuseActivationEncode()(graph_module)
    assert FuseResidual()(graph_module).modified
    assert len(nodes(graph_module, op.silu_mul)) == 1
    assert aten.add.Tensor not in targets(graph_module)
    x = values(2, 3, 64)
    assert torch.equal(graph_module(x)[0], before(x)[0])
    assert_unchanged(FuseResidual(), graph_module)


def test_a_second_residual_does_not_take_the_place_of_the_first():
    def block(m, x):
        return m.down(nn.functional.silu(x) * x.cos()) + x + x.sin()

    before, graph_module = (prepacked_graph(block, **members()) for _ in range(2))
    for one in (before, graph_module):
        FuseActivationEncode()(one)
    assert FuseResidual()(graph_module).modified
    assert_unchanged(FuseResidual(), graph_module)
    x = values(2, 3, 64)
    assert torch.equal(graph_module(x)[0], before(x)[0])


def test_a_graph_without_metadata_stays():
    graph_module = prepacked_graph(lambda m, x: m.down(x) + x, **members())
    for node in graph_module.graph.nodes:
        node.meta.clear()
    result = assert_unchanged(FuseResidual(), graph_module)
    assert [refusal.reason for refusal in result.refusals] == [NO_METADATA]


def known_later(m, x):
    out = m.down(x)
    return out + torch.tanh(x)


def written_before_the_sum(m, x):
    state = x + 1
    alias = state.view(-1)
    out = m.down(x)
    alias.mul_(2)
    return out + state


def reshaped(m, x):
    return m.down(x).view(-1, 64) + x.view(-1, 64)


def read_alone(m, x):
    out = m.down(x)
    return out + x, out * 2


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (known_later, "tanh is known only after the linear has run"),
        (written_before_the_sum, "something writes to add before it is added"),
        (read_alone, "mul reads the result without the residual"),
        (lambda m, x: m.down(x) + m.down.bias, "down_bias is not of the result's shape and dtype"),
        (lambda m, x: m.down(x.bfloat16().float()) + x.bfloat16(), "to_2 is not of the result's shape and dtype"),
        (lambda m, x: (lambda flat: m.down(x).view(-1, 64) + flat)(x.view(-1, 64)),
         "the result is reshaped before the residual is added"),
    ],
    ids=str,
)  # fmt: skip
def test_near_misses_stay_and_say_why(block, reason):
    graph_module = prepacked_graph(block, **members())
    result = assert_unchanged(FuseResidual(), graph_module)
    assert [(refusal.layer, refusal.reason) for refusal in result.refusals] == [("down", reason)]


@pytest.mark.parametrize(
    "block",
    [
        lambda m, x: m.down(x) * x,
        lambda m, x: torch.add(m.down(x), x, alpha=2),
        lambda m, x: m.down(x) + 1,
        lambda m, x: nn.functional.dropout(m.down(x), 0.5, True) + x,
        lambda m, x: (lambda out: out * (out + out.pow(3)))(m.down(x)),
    ],
    ids=["a product", "a weighted sum", "a number", "after a dropout", "within an activation"],
)
def test_what_is_no_residual_is_not_worth_a_word(block):
    graph_module = prepacked_graph(block, **members())
    result = assert_unchanged(FuseResidual(), graph_module)
    assert not result.refusals


@torch.no_grad()
@pytest.mark.parametrize(("family", "fused"), [("llama", 4), ("gpt2", 4), ("gpt-neox", 1), ("gemma2", 0)])
def test_whole_models(family, fused):
    """Gemma norms what it adds; in GPT-NeoX the second of two parallel branches takes the first one's result."""
    assert family in CAUSAL_LMS
    q = own_causal_lm(family, torch.bfloat16)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = q(ids).logits
    assert FuseResidual()(q.graph_module).modified == bool(fused)
    assert len(nodes(q.graph_module, op.residual)) == fused
    assert torch.equal(q(ids).logits, expected)
