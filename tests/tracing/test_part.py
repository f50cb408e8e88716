"""A part of a traced graph as a graph of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lobcq_fx.errors import TraceError
from lobcq_fx.graph.shared_tensors import SharingGraphModule
from lobcq_fx.tracing.part import part_of
from lobcq_fx.tracing.trace import trace_module


class TwoHalves(nn.Module):
    """The second half reads sizes of the first's input, and memory that the first writes to after it was made."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, y):
        middle = torch.zeros_like(x)
        middle[:, 1:] = self.first(x)[:, 1:]
        return middle, self.second(middle).reshape(-1, x.shape[1], 8).sum(1) + y[: x.shape[0]]


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    return trace_module(TwoHalves().eval(), (torch.randn(3, 5, 8), torch.randn(3, 8))).graph_module


def ends(traced):
    return traced.graph.find_nodes(op="placeholder"), traced.graph.output_node().all_input_nodes


def run(traced, graph, *inputs):
    graph.lint()
    return SharingGraphModule(traced, graph)(*inputs)


def test_parts_compute_what_the_whole_does_at_other_sizes(traced):
    (x, y), (middle, result) = ends(traced)
    halves = part_of(traced.graph, [x], [middle]), part_of(traced.graph, [middle, y], [result])
    assert any("copy_" in str(node.target) for node in halves[0].nodes)
    assert {node.target for node in halves[1].find_nodes(op="get_attr")} == {"second.weight", "second.bias"}
    given, added = torch.randn(4, 7, 8), torch.randn(4, 8)
    expected = traced(given, added)
    (first,) = run(traced, halves[0], given)
    torch.testing.assert_close(first, expected[0])
    torch.testing.assert_close(run(traced, halves[1], first, added)[0], expected[1])
    assert all(node.meta["val"].shape for half in halves for node in half.find_nodes(op="placeholder"))


def test_inputs_stand_in_their_order_whether_they_are_read_or_not(traced):
    (x, y), (middle, result) = ends(traced)
    part = part_of(traced.graph, [y, middle, x], [middle, result])
    assert [node.name for node in part.find_nodes(op="placeholder")] == ["y", middle.name, "x"]


def test_what_depends_on_more_is_refused_by_name(traced):
    (x, y), (_, result) = ends(traced)
    with pytest.raises(TraceError, match="depends on y, not on x alone"):
        part_of(traced.graph, [x], [result])
    with pytest.raises(TraceError, match="depends on x, not on y alone"):
        part_of(traced.graph, [y], [result])


class ReadTooEarly(nn.Module):
    def forward(self, x):
        middle = x * 2
        early = middle + 1
        middle[:, 1:] = 0
        return middle, early * middle


def test_an_input_that_is_written_to_after_it_was_read_is_refused():
    graph = trace_module(ReadTooEarly(), (torch.randn(3, 5),)).graph_module.graph
    middle, result = graph.output_node().all_input_nodes
    with pytest.raises(TraceError, match=r"add reads mul before the last write to it"):
        part_of(graph, [middle], [result])
