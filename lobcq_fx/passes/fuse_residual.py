"""Pass: what is added to a linear's result is added where the result is made.

add(residual, linear_prepacked(x, ...)[0])  ->  linear_prepacked.residual(x, ..., [residual])[0]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from lobcq_fx.passes.aliasing import written_between
from lobcq_fx.passes.attributes import add_call
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.passes.prepack import ABSENT, absent
from lobcq_fx.passes.prepacked_calls import (
    NO_METADATA,
    PrepackedCall,
    Refusal,
    prepacked_calls,
    same_kind,
    through_views,
    value_of,
    viewed_alike,
)

aten = torch.ops.aten
linear_prepacked = torch.ops.lobcq.linear_prepacked

_WITH_RESIDUALS = {
    linear_prepacked.default: linear_prepacked.residual,
    linear_prepacked.float_activation: linear_prepacked.float_activation_residual,
    linear_prepacked.silu_mul: linear_prepacked.silu_mul,
}


@dataclass(frozen=True)
class _Sum:
    """`addition` of a residual and of `end`, which views and dropouts lead to from a result."""

    addition: fx.Node
    end: fx.Node
    residual: fx.Node


@dataclass(frozen=True)
class FuseResidual(GraphPass):
    """The sum is rounded twice, as in the graph: the result first, then with the residual.

    `refusals` is filled with sums that stay as they are.
    """

    name: ClassVar[str] = "fuse_residual"

    refusals: list[Refusal] = field(default_factory=list, compare=False)

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite calls one by one, each with the residuals of all its results."""
        modified = False
        for call in prepacked_calls(graph_module.graph, *_WITH_RESIDUALS):
            sums = {index: _sum(call, index) for index in range(len(call.weights))}
            for index, found in sums.items():
                if isinstance(found, str):
                    self.refusals.append(Refusal(self.name, call.layers[index], found))
            wanted = {index: found for index, found in sums.items() if isinstance(found, _Sum)}
            if wanted:
                self._replace(graph_module, call, wanted)
                modified = True
        return modified

    def _replace(self, graph_module: fx.GraphModule, call: PrepackedCall, sums: dict[int, _Sum]) -> None:
        graph, none = graph_module.graph, absent(graph_module)
        residuals = call.arguments.get("residuals") or [none] * len(call.weights)
        for index, one in sums.items():
            result = call.result(index)
            assert result is not None
            with graph.inserting_before(call.node):
                residuals = [*residuals[:index], _like(graph, one.residual, result, one.end), *residuals[index + 1 :]]
        node = call.replace(_WITH_RESIDUALS[call.node.target], {"residuals": residuals})  # type: ignore[index]
        for index, one in sums.items():
            result = PrepackedCall(node).result(index)
            assert result is not None
            with graph.inserting_before(one.addition):
                final = viewed_alike(graph, result, _views(one.end))
            one.addition.replace_all_uses_with(final)
            _erase(graph, one.addition)


def _sum(call: PrepackedCall, index: int) -> _Sum | str | None:
    """What the result is added to; a text where that cannot be fused; None if to nothing, or if it has a residual."""
    residuals = call.arguments.get("residuals")
    if residuals is not None and residuals[index].target != ABSENT:
        return None
    result = end = call.result(index)
    while end is not None:
        additions = [user for user in end.users if _is_sum(user)]
        if additions:
            break
        onward = [user for user in end.users if _passes_on(user)]
        end = onward[0] if len(end.users) == 1 and onward else None
    if end is None:
        return None
    addition = additions[0]
    residual = addition.args[1] if addition.args[0] is end else addition.args[0]
    assert isinstance(residual, fx.Node)
    if len(end.users) > 1:
        reader = next(user for user in end.users if user is not addition)
        return f"{reader.name} reads the result without the residual" if residual < call.node else None
    if value_of(end) is None:
        return NO_METADATA
    if not same_kind(residual, end, addition):
        return f"{residual.name} is not of the result's shape and dtype"
    if not residual < call.node:
        return f"{residual.name} is known only after the linear has run"
    value = value_of(result)
    assert value is not None  # the sum's is known
    if _views(end) and value.dim() != 2:
        return "the result is reshaped before the residual is added"
    if written_between(call.node, addition, (residual,)):
        return f"something writes to {residual.name} before it is added"
    return _Sum(addition, end, residual)


def _is_sum(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)


def _passes_on(node: fx.Node) -> bool:
    """Whether a node hands its input on: a view of whole rows, or a dropout that drops nothing."""
    return bool(through_views(node)[1]) or _is_idle_dropout(node)


def _is_idle_dropout(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and (node.args[2] is False or bool(node.args[1] == 0))


def _views(end: fx.Node) -> list[fx.Node]:
    """The views between a result and `end`, the last first."""
    views = []
    while _passes_on(end):
        if not _is_idle_dropout(end):
            views.append(end)
        end = end.args[0]  # type: ignore[assignment]
    return views


def _like(graph: fx.Graph, residual: fx.Node, result: fx.Node, end: fx.Node) -> fx.Node:
    """The residual in the result's shape [M, N], which views may have changed on the way to the sum."""
    if not _views(end):
        return residual
    value = value_of(result)
    assert value is not None
    return add_call(graph, aten.reshape.default, (residual, [-1, value.shape[1]]), like=residual)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing reads, and what only it read."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for one in inputs:
        if not one.users and one.op == "call_function" and _passes_on(one):
            _erase(graph, one)
