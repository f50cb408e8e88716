"""Pass: recurrent layers in a graph that comes from a file are checked for what torch does not check.

lstm(x, [h, c], ...)  ->  lstm(reshape(to(x), [B, T, K]), [reshape(to(h), [L, B, H]), reshape(to(c), [L, B, H])], ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lobcq_fx.graph.attributes import get_attribute, named_arguments
from lobcq_fx.graph.recurrence import recurrences
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.tracing.example import from_a_file

aten = torch.ops.aten

GUARDED = "lobcq_guarded"
"""In the metadata of a call that has its guards: no file can write that."""


@dataclass(frozen=True)
class GuardRecurrence(GraphPass):
    """Give inputs and states the sizes and the dtype that the parameters ask for, or raise: torch's kernels trust them.

    Views that change nothing where they agree. The parameters are checked as they are read from the file. Graphs that
    were traced here are right as they are.
    """

    name: ClassVar[str] = "guard_recurrence"

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Guard every recurrent layer of the graph."""
        graph = graph_module.graph
        found = [one for one in recurrences(graph) if from_a_file(graph) and GUARDED not in one.node.meta]
        for one in found:
            weight, recurrent = (get_attribute(graph_module, str(node.target)) for node in one.parameters[:2])
            with graph.inserting_before(one.node):
                sizes = [graph.call_function(aten.sym_size.int, (one.input, place)) for place in (0, 1)]
                x = _shaped(graph, one.input, [*sizes, weight.shape[1]], weight.dtype)
                state = [one.levels * one.directions, sizes[one.batch], recurrent.shape[1]]
                states = [_shaped(graph, old, state, weight.dtype) for old in one.states]
            hx = states if isinstance(named_arguments(one.node)["hx"], (list, tuple)) else states[0]
            one.node.kwargs, one.node.args = named_arguments(one.node) | {"input": x, "hx": hx}, ()
            one.node.meta[GUARDED] = True
        return bool(found)


def _shaped(graph: fx.Graph, tensor: fx.Node, sizes: list[Any], dtype: torch.dtype) -> fx.Node:
    return graph.call_function(aten.reshape.default, (graph.call_function(aten.to.dtype, (tensor, dtype)), sizes))
