"""Pass: a norm is computed on the way into the encoder, together with the sum that it norms.

linear_prepacked(rms_norm(x), ...)       ->  linear_prepacked.rms_norm(x, weight, eps, ...)
linear_prepacked(layer_norm(x), ...)     ->  linear_prepacked.layer_norm(x, weight, bias, eps, ...)
linear_prepacked(rms_norm(x + y), ...)   ->  linear_prepacked.add_rms_norm(x, y, weight, eps, ...), whose first result
                                             is the sum
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lobcq_fx.graph.aliasing import written_between
from lobcq_fx.graph.attributes import add_call
from lobcq_fx.graph.dead_code import erase_dead_nodes
from lobcq_fx.graph.norms import LayerNorm, RmsNorm, match_norm
from lobcq_fx.graph.prepacked_calls import (
    PrepackedCall,
    other_readers,
    prepacked_calls,
    same_kind,
    through_views,
    viewed_alike,
)
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.refusal import Refusal

aten = torch.ops.aten
linear_prepacked = torch.ops.lobcq.linear_prepacked

Norm = RmsNorm | LayerNorm


@dataclass(frozen=True)
class FuseNormEncode(GraphPass):
    """RMSNorm or LayerNorm + encode, by the rules of `lobcq_fx.ops.prologues`.

    They round where the graph does, but take means more exactly than it does, which moves few of the bytes that are
    encoded. It refuses norms that stay as they are.
    """

    name: ClassVar[str] = "fuse_norm_encode"

    def attempt(self, graph_module: fx.GraphModule) -> tuple[bool, list[Refusal]]:
        """Rewrite every call whose activation is a norm's result; norms that nothing reads then go."""
        graph, modified, refusals = graph_module.graph, False, list[Refusal]()
        for call in prepacked_calls(graph, linear_prepacked.default):
            result, views = through_views(call.arguments["x"])
            found = _fusible(call, result)
            if isinstance(found, str):
                refusals.append(Refusal(self.name, call.layers[0], found))
            if isinstance(found, (RmsNorm, LayerNorm)):
                _replace(graph, call, found, views)
                modified = True
        if modified:
            erase_dead_nodes(graph)
        return modified, refusals


def _fusible(call: PrepackedCall, result: fx.Node) -> Norm | str | None:
    norm = match_norm(result)
    if norm is None or isinstance(norm, str):
        return norm
    for reader in other_readers(result, {call.node}):
        if reader.target is not linear_prepacked.default:
            return f"{reader.name} reads the norm's result too"
    bias = norm.bias if isinstance(norm, LayerNorm) else None
    operands = [operand for operand in (norm.x, norm.weight, bias) if operand is not None]
    if written_between(min(norm.nodes), call.node, operands):
        return "something writes to the norm's input or parameters before the linear runs"
    return norm


def _replace(graph: fx.Graph, call: PrepackedCall, norm: Norm, views: list[fx.Node]) -> None:
    parts: dict[str, Any] = {"norm_weight": norm.weight, "eps": norm.eps}
    if isinstance(norm, LayerNorm):
        target = linear_prepacked.layer_norm
        parts["norm_bias"] = norm.bias
    else:
        target = linear_prepacked.rms_norm
        parts |= {"offset": norm.offset, "round_first": norm.round_first}
        addends = [] if views else _addends(call, norm)
        if addends:
            one, other = addends
            node = call.replace(linear_prepacked.add_rms_norm, {**parts, "x": one, "residual": other}, more_results=1)
            _erase_unread(graph, norm.nodes)
            with graph.inserting_after(node):
                total = add_call(graph, operator.getitem, (node, 0), like=norm.x)
            norm.x.replace_all_uses_with(total)
            graph.erase_node(norm.x)
            return
    with graph.inserting_before(call.node):
        x = viewed_alike(graph, norm.x, views)
    call.replace(target, {**parts, "x": x})
    _erase_unread(graph, norm.nodes)


def _addends(call: PrepackedCall, norm: RmsNorm) -> list[fx.Node]:
    """The two tensors whose sum is normed, where the sum can be made by the call: nothing else reads it earlier."""
    total = norm.x
    if total.target is not aten.add.Tensor or total.kwargs:
        return []
    addends = [one for one in total.args if isinstance(one, fx.Node)]
    if len(addends) < 2 or not same_kind(total, *addends):
        return []
    inside = {call.node, *norm.nodes}
    stays = any(user not in inside for node in norm.nodes for user in node.users)
    earlier = any(user < call.node and user not in inside for user in total.users)
    return [] if stays or earlier or written_between(total, call.node, addends) else addends


def _erase_unread(graph: fx.Graph, nodes: tuple[fx.Node, ...]) -> None:
    """Erase what nothing reads now of a norm's nodes, from its result on to its input, and the views of its result."""
    for node in sorted(nodes, reverse=True):
        for user in list(node.users):
            if not user.users and through_views(user)[1]:
                graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)
