"""guard_attention: keys and values of different lengths are an error, not a read behind the shorter ones."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from lobcq_fx.passes.guard_attention import GuardAttention
from tests.passes.graphs import assert_unchanged, values

aten = torch.ops.aten
attention = aten.scaled_dot_product_attention.default


def attending(*names, **keywords):
    """As a file holds it: without metadata."""
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    given = dict(zip(("query", "key", "value"), (q, k, v), strict=True))
    args = [given.pop(name) for name in names]
    graph.output(graph.call_function(attention, tuple(args), {**given, **keywords}))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("names", [("query", "key", "value"), ("query",)])
@pytest.mark.parametrize("gqa", [False, True])
def test_lengths_have_to_agree(names, gqa):
    graph_module = attending(*names, enable_gqa=gqa)
    assert GuardAttention()(graph_module).modified
    assert_unchanged(GuardAttention(), graph_module)
    q, k, v = (values(2, 4, length, 16, seed=length) for length in (3, 7, 7))
    assert torch.equal(graph_module(q, k, v), attention(q, k, v, enable_gqa=gqa))
    longer = torch.cat((k, k), 2)
    assert torch.equal(graph_module(q, longer, v), attention(q, k, v, enable_gqa=gqa))
    with pytest.raises((RuntimeError, IndexError), match="exceeds dimension size"):
        graph_module(q, k, torch.cat((v, v), 2))


def test_graphs_that_were_traced_stay():
    graph_module = attending("query", "key", "value")
    for node in graph_module.graph.find_nodes(op="placeholder"):
        node.meta["val"] = values(2, 4, 7, 16)
    assert_unchanged(GuardAttention(), graph_module)
