"""Pass: a gated activation is computed on the way into the encoder.

linear_prepacked(silu(gate) * up, ...)  ->  linear_prepacked.silu_mul(gate, up, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lobcq_fx.graph.aliasing import written_between
from lobcq_fx.graph.dead_code import erase_dead_nodes
from lobcq_fx.graph.prepacked_calls import (
    NO_METADATA,
    PrepackedCall,
    other_readers,
    prepacked_calls,
    same_kind,
    through_views,
    value_of,
    viewed_alike,
)
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.passes.prepack import absent
from lobcq_fx.refusal import Refusal

aten = torch.ops.aten
linear_prepacked = torch.ops.lobcq.linear_prepacked

_OTHERS = {
    aten.gelu.default: "gelu",
    aten.relu.default: "relu",
    aten.square.default: "square",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
}


@dataclass(frozen=True)
class FuseActivationEncode(GraphPass):
    """SiLU(gate) * up + encode, by the rule of `lobcq_fx.ops.prologues.silu_mul`.

    It refuses what looks alike and stays as it is.
    """

    name: ClassVar[str] = "fuse_activation_encode"

    def attempt(self, graph_module: fx.GraphModule) -> tuple[bool, list[Refusal]]:
        """Rewrite every call whose activation is a gated one; the products that nothing reads then go."""
        graph, modified, refusals = graph_module.graph, False, list[Refusal]()
        for call in prepacked_calls(graph, linear_prepacked.default):
            product, views = through_views(call.arguments["x"])
            found = _gated(call, product)
            if isinstance(found, str):
                refusals.append(Refusal(self.name, call.layers[0], found))
            if not isinstance(found, tuple):
                continue
            with graph.inserting_before(call.node):
                gate, up = (viewed_alike(graph, one, views) for one in found)
            residuals = [absent(graph_module)] * len(call.weights)
            call.replace(linear_prepacked.silu_mul, {"gate": gate, "up": up, "residuals": residuals})
            modified = True
        if modified:
            erase_dead_nodes(graph)
        return modified, refusals


def _gated(call: PrepackedCall, product: fx.Node) -> tuple[fx.Node, fx.Node] | str | None:
    """gate and up; a text where the activation is another; None if it is none."""
    if product.target in _OTHERS:
        return f"{_OTHERS[product.target]} is not fused, silu(gate) * up is"
    if product.target is aten.silu.default:
        return "silu is fused with a factor alone: silu(gate) * up"
    if product.target is not aten.mul.Tensor:
        return None
    for silu, up in (product.args, product.args[::-1]):
        if isinstance(silu, fx.Node) and silu.target in _OTHERS:
            return f"{_OTHERS[silu.target]}(gate) * up is not fused, silu(gate) * up is"
        if not isinstance(silu, fx.Node) or silu.target is not aten.silu.default:
            continue
        gate = silu.args[0]
        assert isinstance(gate, fx.Node)
        if value_of(gate) is None:
            return NO_METADATA
        if not isinstance(up, fx.Node) or not same_kind(gate, up, product):
            return "gate and up are not of one shape and dtype"
        readers = [*other_readers(product, {call.node}), *other_readers(silu, {product})]
        if readers:
            return f"{readers[0].name} reads the activation too"
        if written_between(silu, call.node, (gate, up)):
            return "something writes to gate or up before the linear runs"
        return gate, up
    return None
