"""Calls of `lobcq::linear_prepacked` as the passes that fuse them see them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import lobcq_fx.ops  # noqa: F401  (registers the ops)
from lobcq_fx.graph.attributes import add_call, named_arguments
from lobcq_fx.modules.packed_weight import PREPACKED

aten = torch.ops.aten

NO_METADATA = "the graph says nothing of its dtypes"

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class PrepackedCall:
    """One call of an overload of `lobcq::linear_prepacked`."""

    node: fx.Node

    @property
    def arguments(self) -> dict[str, Any]:
        """By the schema's names."""
        return named_arguments(self.node)

    @property
    def layers(self) -> list[str]:
        """Module paths of the linears."""
        return [str(weight.target).removesuffix(f".{PREPACKED}").removesuffix(".weight") for weight in self.weights]

    @property
    def weights(self) -> list[fx.Node]:
        """The weights in kernel layout."""
        weights: list[fx.Node] = self.arguments["weights"]
        return weights

    def result(self, index: int) -> fx.Node | None:
        """The node that reads one result, None where nothing does."""
        return next((user for user in self.node.users if user.args[1] == index), None)

    def replace(self, target: Any, changes: Mapping[str, Any], more_results: int = 0) -> fx.Node:
        """Call an overload, this one or another, with this call's arguments but for `changes`; the results move there.

        more_results: how many results the other overload has before those of the linears.
        """
        graph, arguments = self.node.graph, {**self.arguments, **changes}
        with graph.inserting_before(self.node):
            args = tuple(arguments[argument.name] for argument in target._schema.arguments)
            call = add_call(graph, target, args, like=self.node)
            for result in list(self.node.users):
                index = result.args[1] + more_results  # type: ignore[operator]
                result.replace_all_uses_with(add_call(graph, operator.getitem, (call, index), like=result))
                graph.erase_node(result)
        graph.erase_node(self.node)
        return call


def prepacked_calls(graph: fx.Graph, *targets: Any) -> Iterator[PrepackedCall]:
    """The calls of some overloads, in order; the graph may change on the way."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in targets:
            yield PrepackedCall(node)


def through_views(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What `node` is a view of that leaves every row whole, and the views, the last first."""
    views = []
    while node.target in _VIEWS and _columns(node) is not None and _columns(node) == _columns(node.args[0]):
        views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, views


def viewed_alike(graph: fx.Graph, node: fx.Node, views: list[fx.Node]) -> fx.Node:
    """`node`, of the shape of what `views` are views of, through the same views, at the insertion point."""
    for view in reversed(views):
        node = add_call(graph, aten.reshape.default, (node, *view.args[1:]), like=view)
    return node


def other_readers(node: fx.Node, readers: set[fx.Node]) -> list[fx.Node]:
    """Who reads `node`, itself or through views that leave rows whole, besides `readers`."""
    found = []
    for user in node.users:
        if user in readers:
            continue
        if through_views(user)[1]:
            found.extend(other_readers(user, readers))
        else:
            found.append(user)
    return found


def value_of(node: Any) -> torch.Tensor | None:
    """The tensor that the graph's metadata describes a node by, None where it has none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def same_kind(*nodes: Any) -> bool:
    """Whether all are tensors of one shape and dtype, as far as the metadata tells."""
    values = [value_of(node) for node in nodes]
    first = values[0]
    return first is not None and all(v is not None and (v.shape, v.dtype) == (first.shape, first.dtype) for v in values)


def _columns(node: Any) -> Any:
    value = value_of(node)
    return None if value is None or value.dim() == 0 else value.shape[-1]
