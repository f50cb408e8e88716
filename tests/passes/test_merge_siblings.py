"""merge_siblings: linears of one activation in one call, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lobcq_fx.config import LobcqConfig
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.passes.merge_siblings import MergeSiblings
from lobcq_fx.passes.prepack import Prepack
from tests.families import quantized_causal_lm
from tests.passes.graphs import assert_metadata, assert_unchanged, linear, lobcq, nodes, quantized, run, values

LAYOUT = weight_layout(torch.device("cpu"))
pytestmark = pytest.mark.skipif(LAYOUT is None, reason="the CPU core was not built, or is switched off")

OPS = {
    "w4a4": lobcq.linear_prepacked.default,
    "w4a8": lobcq.linear_prepacked.default,
    "w4a16": lobcq.linear_prepacked.float_activation,
}
CALLS = [values(2, 3, 64), values(1, 1, 64), values(5, 9, 64)]


def prepacked(function, config=None, data=None, **options):
    graph_module = quantized(function, config, data, **options)
    assert Prepack(LAYOUT)(graph_module).modified
    return graph_module


def three(m, x):
    return m.q(x), torch.relu(m.k(x)), m.v(x)


def members():
    return {"q": linear(48, 64), "k": linear(17, 64, bias=False, seed=1), "v": linear(5, 64, seed=2)}


@pytest.mark.parametrize(
    ("mode", "scale"), [("w4a4", "per_token"), ("w4a4", "static"), ("w4a8", "static"), ("w4a16", "per_token")]
)
def test_siblings_become_one_call_with_the_same_bits(mode, scale):
    graph_module = prepacked(three, LobcqConfig(mode=mode, activation_scale=scale), values(2, 3, 64), **members())
    assert len(nodes(graph_module, OPS[mode])) == 3
    before = [run(graph_module, x) for x in CALLS]
    result = MergeSiblings()(graph_module)
    assert result.modified
    assert not result.refusals
    (call,) = nodes(graph_module, OPS[mode])
    assert [user.args[1] for user in call.users] == [0, 1, 2]
    for x, expected in zip(CALLS, before, strict=True):
        for actual, wanted in zip(run(graph_module, x), expected, strict=True):
            assert torch.equal(actual, wanted)
        assert_metadata(graph_module, x)
    assert_unchanged(MergeSiblings(), graph_module)


def test_a_result_that_nothing_reads_leaves_no_trace():
    graph_module = prepacked(three, **members())
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    expected = run(graph_module, CALLS[0])
    output.args = ((output.args[0][0], output.args[0][2]),)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    MergeSiblings()(graph_module)
    actual = run(graph_module, CALLS[0])
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[2])


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(32, 64, bias=False), linear(32, 64, bias=False, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        first = self.a(y)
        y.view(-1).mul_(-3)
        return first + self.b(y)


@pytest.mark.parametrize(
    ("function", "settings", "reason"),
    [
        (lambda m, x: m.a(x) + m.b(x), {"overrides": {"b": {"format": "8x32"}}},
         "it reads the activation of a with another array size"),
        (lambda m, x: m.a(x) + m.b(x), {"overrides": {"b": {"format": "16x64"}}},
         "it reads the activation of a with another activation format"),
        (lambda m, x: m.a(x) + m.b(x), {"overrides": {"b": {"mode": "w4a8"}}},
         "it reads the activation of a with another activation format"),
        (lambda m, x: m.block(x), {}, "its activation was written to after block.a had read it"),
        (lambda m, x: m.block(x), {"mode": "w4a16"}, "its activation was written to after block.a had read it"),
    ],
    ids=str,
)  # fmt: skip
def test_near_misses_stay_apart_and_say_why(function, settings, reason):
    linears = {"a": linear(32, 64), "b": linear(32, 64, seed=1), "block": InPlace()}
    graph_module = prepacked(function, LobcqConfig(**settings), **linears)
    result = assert_unchanged(MergeSiblings(), graph_module)
    assert [refusal.reason for refusal in result.refusals] == [reason]
    assert result.refusals[0].layer.endswith("b")


def test_an_activation_that_one_reads_rotated():
    graph_module = prepacked(lambda m, x: (m.q(x), m.k(x)), rotated=("q",), **members())
    result = assert_unchanged(MergeSiblings(), graph_module)
    assert [refusal.reason for refusal in result.refusals] == ["it reads the activation of q with another rotation"]
    graph_module = prepacked(lambda m, x: (m.q(x), m.k(x)), rotated=("q", "k"), **members())
    assert MergeSiblings()(graph_module).modified


def test_linears_of_different_activations_are_no_siblings():
    graph_module = prepacked(lambda m, x: m.q(x) + m.q(x.sin()), **members())
    result = assert_unchanged(MergeSiblings(), graph_module)
    assert not result.refusals


def test_a_whole_model():
    graph = quantized_causal_lm("llama")[1].graph_module
    assert [len(call.args[3]) for call in nodes(graph, OPS["w4a4"])] == [3, 1, 2, 1] * 2
