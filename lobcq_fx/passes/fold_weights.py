"""Pass: compute weights that the graph makes of constants alone, so that matmuls read them as constants.

linear(x, split(w)[0])             ->  linear(x, w_part)      cross-attention of nn.MultiheadAttention
linear(x, g * v / norm(v))         ->  linear(x, v_part)      weight norm
linear(x, cat(w1, w2))             ->  linear(x, w1_part)
linear(x, to(w, fp32))             ->  linear(x, w)           routers; w itself is cast where nothing reads it otherwise
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from lobcq_fx.graph.aliasing import written_attributes
from lobcq_fx.graph.attributes import add_beside, get_attribute, replace_attribute
from lobcq_fx.graph.dead_code import erase_dead_nodes
from lobcq_fx.graph.operands import constant_nodes, constant_weight, is_transpose, made_of
from lobcq_fx.passes.infra import GraphPass

aten = torch.ops.aten

_OPERANDS = {
    aten.linear.default: {1: 2, 2: 1},
    aten.addmm.default: {0: 1, 2: 2},
    aten.mm.default: {0: 2, 1: 2},
    aten.matmul.default: {0: 2, 1: 2},
}
"""Positions at which a matmul may have its weight or bias, and how many dimensions that has there."""

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)


@dataclass(frozen=True)
class FoldWeights(GraphPass):
    """Replace a matmul's computed 2-D weight, or its bias [N], by a constant, which stands beside what it was made of.

    A whole constant keeps its name, which is the one that the model's class has for it.
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
                if position >= len(node.args) or not _is_computed(node.args[position], constant, rank):
                    continue
                reader, weight = _behind_transposes(node, node.args[position])
                if not all(_can_fold(one, written) for one in made_of(weight)):
                    continue
                if weight not in folded:
                    folded[weight] = _fold(graph_module, weight)
                reader.replace_input_with(weight, folded[weight])
        if folded:
            erase_dead_nodes(graph_module.graph)
        return bool(folded)


def _is_computed(operand: Any, constant: set[fx.Node], rank: int) -> bool:
    """Whether an operand is of that rank, and computed of constants; not a constant, or where inputs take part."""
    if operand not in constant or constant_weight(operand) is not None:
        return False
    value = operand.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == rank


def _behind_transposes(reader: fx.Node, weight: Any) -> tuple[fx.Node, fx.Node]:
    """What a matmul's operand is the transpose of, and the node that reads that: transposes are seen through later."""
    while is_transpose(weight):
        reader, weight = weight, weight.args[0]
    return reader, weight


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
    name = str(first.target)
    before = get_attribute(graph_module, name)
    if _is_whole(value, before):
        return first
    constant = value.detach().clone(memory_format=torch.contiguous_format)
    if _is_cast(node, first) and _all_cast(graph_module.graph.find_nodes(op="get_attr", target=name), value.dtype):
        replace_attribute(graph_module, name, constant)
        return first
    return add_beside(graph_module, name, "_part", nn.Parameter(constant, requires_grad=False))


def _is_whole(value: Tensor, constant: Tensor) -> bool:
    """Whether a value is a constant as it is: cast to the dtype that it has, sliced from end to end."""
    same_form = (value.dtype, value.shape, value.stride()) == (constant.dtype, constant.shape, constant.stride())
    return same_form and value.data_ptr() == constant.data_ptr()


def _is_cast(node: fx.Node, constant: fx.Node) -> bool:
    return node.target in _CASTS and node.args[0] is constant


def _all_cast(constants: Iterable[fx.Node], dtype: torch.dtype) -> bool:
    """Whether all that reads a constant's nodes casts it to a dtype, and so reads the same once it has that dtype."""
    readers = ((user, one) for one in constants for user in one.users)
    return all(_is_cast(user, one) and user.meta["val"].dtype == dtype for user, one in readers)


def _value(graph_module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node not in known:
        if node.op == "get_attr":
            known[node] = get_attribute(graph_module, str(node.target)).detach()
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: _value(graph_module, one, known))
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]
