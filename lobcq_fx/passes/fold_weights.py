"""Pass: compute weights that the graph makes of constants alone, so that matmuls read them as constants.

linear(x, split(w)[0])             ->  linear(x, w_part)      cross-attention of nn.MultiheadAttention
linear(x, g * v / norm(v))         ->  linear(x, v_part)      weight norm
linear(x, cat(w1, w2))             ->  linear(x, w1_part)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from lobcq_fx.graph.aliasing import written_attributes
from lobcq_fx.graph.attributes import add_get_attr, free_name, get_attribute, register_attribute
from lobcq_fx.graph.dead_code import erase_dead_nodes
from lobcq_fx.graph.operands import constant_nodes, constant_weight, made_of
from lobcq_fx.passes.infra import GraphPass

aten = torch.ops.aten

_OPERANDS = {
    aten.linear.default: {1: 2, 2: 1},
    aten.addmm.default: {0: 1, 2: 2},
    aten.mm.default: {0: 2, 1: 2},
    aten.matmul.default: {0: 2, 1: 2},
}
"""Positions at which a matmul may have its weight or bias, and how many dimensions that has there."""


@dataclass(frozen=True)
class FoldWeights(GraphPass):
    """Replace a matmul's computed 2-D weight, or its bias [N], by a constant, which stands beside what it was made of.

    One that an input, a random number or anything the graph writes to takes part in stays as it is.
    """

    name: ClassVar[str] = "fold_weights"

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Compute each such weight once, whichever matmuls read it."""
        written, constant = set(written_attributes(graph_module.graph)), constant_nodes(graph_module.graph)
        folded: dict[fx.Node, fx.Node] = {}
        for node in list(graph_module.graph.nodes):
            operands = _OPERANDS.get(node.target, {}) if node.op == "call_function" else {}
            for position, rank in operands.items():
                weight = _computed(node.args[position], constant, rank) if position < len(node.args) else None
                if weight is None or not all(_can_fold(one, written) for one in made_of(weight)):
                    continue
                if weight not in folded:
                    folded[weight] = _fold(graph_module, weight)
                node.replace_input_with(weight, folded[weight])
        if folded:
            erase_dead_nodes(graph_module.graph)
        return bool(folded)


def _computed(operand: Any, constant: set[fx.Node], rank: int) -> fx.Node | None:
    """The operand, if it is of that rank, and computed of constants; None for a constant, or where inputs take part."""
    if operand not in constant or constant_weight(operand) is not None:
        return None
    assert isinstance(operand, fx.Node)
    value = operand.meta.get("val")
    return operand if isinstance(value, Tensor) and value.dim() == rank else None


def _can_fold(node: fx.Node, written: set[str]) -> bool:
    if node.op == "get_attr":
        return str(node.target) not in written
    return node.target is operator.getitem or (
        isinstance(node.target, torch._ops.OpOverload)
        and not node.target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )


def _fold(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    value = _value(graph_module, node, {})
    first = next(one for one in made_of(node) if one.op == "get_attr")
    owner, _, last = str(first.target).rpartition(".")
    name = free_name(graph_module, owner, f"{last}_part")
    constant = value.detach().clone(memory_format=torch.contiguous_format)
    register_attribute(graph_module, name, nn.Parameter(constant, requires_grad=False))
    return add_get_attr(graph_module, name)


def _value(graph_module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node not in known:
        if node.op == "get_attr":
            known[node] = get_attribute(graph_module, str(node.target)).detach()
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: _value(graph_module, one, known))
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]
