"""The pass protocol: honest `modified`, checked graphs, sequences."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from typing import ClassVar

import pytest
import torch

from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from lobcq_fx.passes.infra import GraphPass, PassResult, Sequential
from lobcq_fx.passes.normalize_matmuls import NormalizeMatmuls
from tests.passes.graphs import Function, aten, graph_of, linear, parameter, values


@dataclass(frozen=True)
class Negate(GraphPass):
    """Put `neg` before the output; a malformed graph if `broken`."""

    name: ClassVar[str] = "negate"

    broken: bool = False

    def transform(self, graph_module):
        assert not torch.is_grad_enabled()
        (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
        (value,) = output.args[0]
        first = next(iter(graph_module.graph.nodes))
        with graph_module.graph.inserting_before(first if self.broken else output):
            output.args = ((graph_module.graph.call_function(aten.neg.default, (value,)),),)
        return True


def test_a_changed_graph_is_recompiled_and_is_the_same_object():
    graph_module = graph_of(linear(32, 64))
    x = values(2, 3, 64)
    before = graph_module(x)[0]
    result = Negate()(graph_module)
    assert result == PassResult(graph_module, True)
    assert torch.equal(graph_module(x)[0], -before)


def test_a_malformed_graph_is_an_error_of_the_pass():
    with pytest.raises(RuntimeError, match="before it has been defined"):
        Negate(broken=True)(graph_of(linear(32, 64)))


def test_a_sequence_is_a_pass_that_runs_all_and_reports_any():
    model = Function(lambda m, x: x @ m.w, w=parameter(64, 32))
    passes = Sequential((NormalizeMatmuls(), EliminateDeadCode()))
    graph_module = graph_of(model)
    assert passes(graph_module).modified
    assert not passes(graph_module).modified
    assert not Sequential(())(graph_module).modified


def test_options_are_frozen():
    with pytest.raises(FrozenInstanceError):
        Negate().broken = True  # type: ignore[misc]
