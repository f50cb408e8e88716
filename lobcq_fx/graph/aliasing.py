"""Which nodes look at the same memory, and which write to it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable

import torch
from torch import fx

from lobcq_fx.graph.attributes import named_arguments

aten = torch.ops.aten

_UNDECLARED = (
    aten.dropout.default,
    aten.type_as.default,
    aten.atleast_1d.default,
    aten.atleast_2d.default,
    aten.atleast_3d.default,
    aten.broadcast_tensors.default,
)
"""Operators that may return their input itself, or views of it, and do not declare it. Of several tensors the first
one stands for all: `broadcast_tensors`."""


_UNDECLARED_WRITES = {
    aten.batch_norm.default: ("training", ("running_mean", "running_var")),
    aten.instance_norm.default: ("use_input_stats", ("running_mean", "running_var")),
}
"""Operators that write to arguments where a flag is set, and do not declare it."""


class Writes:
    """How often the memory behind a node has been written to, counted as a pass walks through the graph in order.

    Two reads of one node with a write between them are reads of different values.
    """

    def __init__(self) -> None:
        self._counts: Counter[fx.Node] = Counter()

    def visit(self, node: fx.Node) -> None:
        """Count what `node` writes."""
        self._counts.update(owner_of(argument) for argument in written_arguments(node))

    def before(self, node: fx.Node) -> int:
        """Writes so far to the memory that `node` looks at."""
        return self._counts[owner_of(node)]


def written_between(first: fx.Node, last: fx.Node, values: Iterable[fx.Node]) -> bool:
    """Whether a node after `first` and before `last` writes to memory that one of `values` looks at."""
    owners = {owner_of(value) for value in values}
    node = first.next
    while node is not last:
        if any(owner_of(argument) in owners for argument in written_arguments(node)):
            return True
        node = node.next
    return False


def written_attributes(graph: fx.Graph) -> list[str]:
    """Names of the parameters and buffers that the graph writes to."""
    return list(dict.fromkeys(str(owner.target) for owner in _written_owners(graph) if owner.op == "get_attr"))


def writes_inputs(graph: fx.Graph) -> bool:
    """Whether the graph writes to a tensor that is passed to it."""
    return any(owner.op == "placeholder" for owner in _written_owners(graph))


def _written_owners(graph: fx.Graph) -> list[fx.Node]:
    return [owner_of(argument) for node in graph.nodes for argument in written_arguments(node)]


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that the node changes in place."""
    if node.target in _UNDECLARED_WRITES:
        flag, names = _UNDECLARED_WRITES[node.target]
        given = named_arguments(node)
        return [given[name] for name in names if given[flag] and isinstance(given[name], fx.Node)]
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    given = named_arguments(node)
    written: list[fx.Node] = []
    for argument in node.target._schema.arguments:
        if argument.is_write:
            fx.node.map_arg(given.get(argument.name), written.append)
    return written


def owner_of(node: fx.Node) -> fx.Node:
    """The node whose memory this one may look at: itself, unless it is a view or the result of an in-place op."""
    while node.op == "call_function" and node.args and _may_alias(node.target):
        first = node.args[0][0] if isinstance(node.args[0], (list, tuple)) and node.args[0] else node.args[0]
        if not isinstance(first, fx.Node):
            break
        node = first
    return node


def _may_alias(target: object) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    return target in _UNDECLARED or any(result.alias_info for result in target._schema.returns)
