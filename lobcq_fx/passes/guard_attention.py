"""Pass: attention in a graph that comes from a file is checked for what torch does not check.

sdpa(q, k, v)  ->  sdpa(q, narrow(k, -2, 0, sym_size(v, -2)), v)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lobcq_fx.graph.attributes import named_arguments
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.tracing.example import from_a_file

aten = torch.ops.aten

LENGTH = -2
"""Dimension of the tokens in keys and values."""


@dataclass(frozen=True)
class GuardAttention(GraphPass):
    """Give every key as many tokens as its value has, or raise: torch's CPU kernel reads on behind the shorter one.

    A view that changes nothing where they agree. Graphs that were traced here are right as they are.
    """

    name: ClassVar[str] = "guard_attention"

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Guard every attention of the graph."""
        graph, modified = graph_module.graph, False
        if not from_a_file(graph):
            return False
        for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            given = named_arguments(node)
            key, value = given["key"], given["value"]
            if is_guarded(key, value):
                continue
            with graph.inserting_before(node):
                length = graph.call_function(aten.sym_size.int, (value, LENGTH))
                guarded = graph.call_function(aten.narrow.default, (key, LENGTH, 0, length))
            for new in (length, guarded):
                new.meta = {name: entry for name, entry in key.meta.items() if name != "val"}
            node.args = tuple(guarded if place == 1 else one for place, one in enumerate(node.args))
            node.kwargs = {name: guarded if name == "key" else one for name, one in node.kwargs.items()}
            modified = True
        return modified


def is_guarded(key: fx.Node, value: fx.Node) -> bool:
    """Whether a key is one of this pass's: as long as the value, which changes nothing where they agree."""
    if key.target is not aten.narrow.default or key.args[1:3] != (LENGTH, 0):
        return False
    length = key.args[3]
    return isinstance(length, fx.Node) and length.target is aten.sym_size.int and length.args == (value, LENGTH)
