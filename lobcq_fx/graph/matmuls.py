"""Find every matmul of a normalized graph, and say of each whether its form allows quantizing it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from lobcq_fx.graph.operands import constant_weight

aten = torch.ops.aten

# Products that normalize_matmuls left as they are -> their two operands' positions.
_PRODUCTS = {
    aten.matmul.default: slice(0, 2),
    aten.mm.default: slice(0, 2),
    aten.bmm.default: slice(0, 2),
    aten.baddbmm.default: slice(1, 3),
    aten.addmm.default: slice(1, 3),
    aten.scaled_dot_product_attention.default: slice(0, 3),
}
_UNSUPPORTED = {
    aten.einsum.default: "einsum is not a supported form; write it as a matmul",
    aten.conv1d.default: "a convolution, not a matmul",
    aten.conv2d.default: "a convolution, not a matmul",
    aten.conv2d.padding: "a convolution, not a matmul",
    aten.conv3d.default: "a convolution, not a matmul",
    aten.convolution.default: "a convolution, not a matmul",
    aten._grouped_mm.default: "fused 3-D expert weights are not supported yet",
}
_ATTENTION = "activation x activation, no constant weight"
_OTHER_FORM = "its constant operand is not a 2-D weight on the right"
_SCALED_ADDMM = "addmm with a bias that is not one value per output, or with beta or alpha other than 1"


@dataclass(frozen=True)
class Matmul:
    """A matmul node and what the passes need to know of it.

    layer: module path of its weight's owner, or of the module that runs it.
    weight: the `get_attr` node of its constant operand, None if it has none.
    flipped: the attribute is [K, N] and the operand its transpose.
    obstacle: why its form forbids quantizing it; None where it is a `linear` with a constant weight.
    """

    node: fx.Node
    layer: str
    weight: fx.Node | None
    flipped: bool
    obstacle: str | None

    @property
    def activation(self) -> fx.Node:
        """The operand [..., K] that is not constant."""
        x = self.node.args[0]
        assert isinstance(x, fx.Node)
        return x

    @property
    def bias(self) -> fx.Node | None:
        """The bias operand [N], or None."""
        bias = self.node.args[2] if len(self.node.args) > 2 else None
        assert bias is None or isinstance(bias, fx.Node)
        return bias

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(N, K) of a 2-D weight; the shape of any other as it is; None without one."""
        if self.weight is None:
            return None
        shape = tuple(self.weight.meta["val"].shape)
        return shape[::-1] if self.flipped else shape


def find_matmuls(graph_module: fx.GraphModule) -> list[Matmul]:
    """Every matmul of the graph in execution order."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is aten.linear.default:
            found.append(_linear(node))
        elif node.target in _PRODUCTS:
            found.append(Matmul(node, module_path(node), None, False, _product_obstacle(node)))
        elif node.target in _UNSUPPORTED or "grouped_mm" in str(node.target):
            reason = _UNSUPPORTED.get(node.target, _UNSUPPORTED[aten._grouped_mm.default])
            found.append(Matmul(node, module_path(node), _attribute_among(node.args[1:]), False, reason))
    return found


def _attribute_among(arguments: Iterable[object]) -> fx.Node | None:
    """The first constant among the operands, seen through nodes of one input, such as a 3-D weight's transposes."""
    for node in arguments:
        while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return node
    return None


def _product_obstacle(node: fx.Node) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    operands = node.args[_PRODUCTS[node.target]]
    if node.target is aten.addmm.default and constant_weight(operands[-1]):
        return _SCALED_ADDMM
    return _OTHER_FORM if any(constant_weight(operand) for operand in operands) else _ATTENTION


def _linear(node: fx.Node) -> Matmul:
    found = constant_weight(node.args[1])
    if found is None:
        return Matmul(node, module_path(node), None, False, "its weight is computed in the graph, not constant")
    weight, flipped = found
    return Matmul(node, _layer_name(node, str(weight.target)), weight, flipped, None)


def _layer_name(node: fx.Node, weight: str) -> str:
    """The weight's module. A tied weight carries one owner's name: then the module that runs the matmul."""
    path = module_path(node)
    if path and not weight.startswith(path + "."):
        return path
    return weight.removesuffix(".weight")


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that was running when the node was traced; "" if unknown."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""
