"""Pass: what is added to a linear's result is added where the result is made.

add(residual, linear_prepacked(x, ...)[0])  ->  linear_prepacked.residual(x, ..., [residual])[0]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lobcq_fx.graph.aliasing import written_between
from lobcq_fx.graph.attributes import add_call
from lobcq_fx.graph.dead_code import erase_dead_nodes
from lobcq_fx.graph.prepacked_calls import (
    NO_METADATA,
    PrepackedCall,
    prepacked_calls,
    same_kind,
    through_views,
    value_of,
    viewed_alike,
)
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.passes.prepack import ABSENT, absent
from lobcq_fx.refusal import Refusal

aten = torch.ops.aten
linear_prepacked = torch.ops.lobcq.linear_prepacked

_WITH_RESIDUALS = {
    linear_prepacked.default: linear_prepacked.residual,
    linear_prepacked.float_activation: linear_prepacked.float_activation_residual,
    linear_prepacked.silu_mul: linear_prepacked.silu_mul,
}


@dataclass(frozen=True)
class _Sum:
    """`addition` of a residual and of a result, to which `views` lead, the last first."""

    addition: fx.Node
    views: list[fx.Node]
    residual: fx.Node


@dataclass(frozen=True)
class FuseResidual(GraphPass):
    """The sum is rounded twice, as in the graph: the result first, then with the residual.

    It refuses sums that stay as they are.
    """

    name: ClassVar[str] = "fuse_residual"

    def attempt(self, graph_module: fx.GraphModule) -> tuple[bool, list[Refusal]]:
        """Rewrite calls one by one, each with the residuals of all its results."""
        graph, modified, refusals = graph_module.graph, False, list[Refusal]()
        for call in prepacked_calls(graph, *_WITH_RESIDUALS):
            sums = {index: _sum(call, index) for index in range(len(call.weights))}
            for index, found in sums.items():
                if isinstance(found, str):
                    refusals.append(Refusal(self.name, call.layers[index], found))
            wanted = {index: found for index, found in sums.items() if isinstance(found, _Sum)}
            if wanted:
                self._replace(graph_module, call, wanted)
                modified = True
        if modified:
            erase_dead_nodes(graph)
        return modified, refusals

    def _replace(self, graph_module: fx.GraphModule, call: PrepackedCall, sums: dict[int, _Sum]) -> None:
        graph, none = graph_module.graph, absent(graph_module)
        residuals = call.arguments.get("residuals") or [none] * len(call.weights)
        for index, one in sums.items():
            result = call.result(index)
            assert result is not None
            with graph.inserting_before(call.node):
                residuals = [*residuals[:index], _like(graph, one, result), *residuals[index + 1 :]]
        node = call.replace(_WITH_RESIDUALS[call.node.target], {"residuals": residuals})  # type: ignore[index]
        for index, one in sums.items():
            result = PrepackedCall(node).result(index)
            assert result is not None
            with graph.inserting_before(one.addition):
                one.addition.replace_all_uses_with(viewed_alike(graph, result, one.views))
            graph.erase_node(one.addition)


def _sum(call: PrepackedCall, index: int) -> _Sum | str | None:
    """What the result is added to; a text where that cannot be fused; None if to nothing, or if it has a residual."""
    residuals = call.arguments.get("residuals")
    if residuals is not None and residuals[index].target != ABSENT:
        return None
    result = end = call.result(index)
    views: list[fx.Node] = []
    while end is not None:
        additions = [user for user in end.users if _is_sum(user)]
        if additions:
            break
        onward = next(iter(end.users)) if len(end.users) == 1 else None
        if onward is not None and through_views(onward)[1]:
            views.insert(0, onward)
        elif onward is None or not _is_idle_dropout(onward):
            return None
        end = onward
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
    if views and value.dim() != 2:
        return "the result is reshaped before the residual is added"
    if written_between(call.node, addition, (residual,)):
        return f"something writes to {residual.name} before it is added"
    return _Sum(addition, views, residual)


def _is_sum(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)


def _is_idle_dropout(node: fx.Node) -> bool:
    """Whether a node is a dropout that drops nothing."""
    return node.target is aten.dropout.default and (node.args[2] is False or bool(node.args[1] == 0))


def _like(graph: fx.Graph, found: _Sum, result: fx.Node) -> fx.Node:
    """The residual in the result's shape [M, N], which views may have changed on the way to the sum."""
    if not found.views:
        return found.residual
    value = value_of(result)
    assert value is not None
    return add_call(graph, aten.reshape.default, (found.residual, [-1, value.shape[1]]), like=found.residual)
