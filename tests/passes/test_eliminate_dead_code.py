"""eliminate_dead_code: dead nodes, then the tensors and submodules that no node refers to."""

from __future__ import annotations

import torch

from lobcq_fx.config import LobcqConfig
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from tests.passes.graphs import (
    Function,
    assert_unchanged,
    aten,
    graph_of,
    linear,
    names,
    nodes,
    normalized,
    observe,
    parameter,
    rewritten,
    run,
    targets,
    values,
)  # fmt: skip


def test_chains_and_what_only_they_read_go_in_one_run():
    def forward(m, x):
        torch.relu(m.dead(x)) + m.w
        return m.live(x)

    model = Function(forward, dead=linear(64, 64), live=linear(32, 64), w=parameter(64))
    graph_module = graph_of(model)
    assert aten.relu.default in targets(graph_module)
    assert {"dead.weight", "w"} < names(graph_module)
    x = values(2, 3, 64)
    expected = run(graph_module, x)

    assert EliminateDeadCode()(graph_module).modified
    assert targets(graph_module) == [aten.linear.default]
    assert names(graph_module) == {"live.weight", "live.bias"}
    assert not hasattr(graph_module, "dead")
    assert torch.equal(run(graph_module, x), expected)
    assert_unchanged(EliminateDeadCode(), graph_module)


def test_unread_inputs_stay_in_the_signature():
    class Two(torch.nn.Module):
        def forward(self, x, unread):
            return x + 1

    graph_module = graph_of(Two(), values(2, 3), values(2, 3))
    assert_unchanged(EliminateDeadCode(), graph_module)
    assert len([n for n in graph_module.graph.nodes if n.op == "placeholder"]) == 2


def test_observers_go_once_the_rewrite_no_longer_reads_them():
    graph_module = normalized(linear(32, 64))
    observe(graph_module, LobcqConfig())
    assert_unchanged(EliminateDeadCode(), graph_module)  # still read
    assert "lobcq_observers.0" in dict(graph_module.named_modules())
    rewritten(graph_module)
    assert EliminateDeadCode()(graph_module).modified
    assert not hasattr(graph_module, "lobcq_observers")
    assert all(n.op != "call_module" for n in graph_module.graph.nodes)


def test_in_place_writes_are_not_dead():
    def forward(m, x):
        y = x.clone()
        y.add_(1)
        return y

    graph_module = graph_of(Function(forward))
    assert nodes(graph_module, aten.add_.Tensor)
    EliminateDeadCode()(graph_module)
    x = values(2, 3, 64)
    assert torch.equal(run(graph_module, x), x + 1)


def test_attention_that_nothing_reads_goes_unless_it_is_random():
    attention = torch.nn.functional.scaled_dot_product_attention

    def forward(m, x):
        attention(x, x, x)
        attention(x, x, x, dropout_p=0.5)
        return attention(x, x, x, dropout_p=0.0)

    graph_module = graph_of(Function(forward))
    found = nodes(graph_module, aten.scaled_dot_product_attention.default)
    assert EliminateDeadCode()(graph_module).modified
    assert nodes(graph_module, aten.scaled_dot_product_attention.default) == found[1:]
    assert_unchanged(EliminateDeadCode(), graph_module)


def test_packed_weights_keep_all_their_parts():
    graph_module = normalized(linear(32, 64))
    rewritten(graph_module)
    EliminateDeadCode()(graph_module)
    parts = {f"weight.{part}" for part in ("codes", "selectors", "scales", "tensor_scale")}
    assert names(graph_module) == parts | {"bias", "lobcq.codebooks"}
