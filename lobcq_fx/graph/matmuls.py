"""Find every matmul of a normalized graph, and say of each whether the settings allow quantizing it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from lobcq_fx.config import LobcqConfig
from lobcq_fx.format.encoded import FLOAT_DTYPES
from lobcq_fx.graph.operands import constant_weight, operation_name
from lobcq_fx.inventory import MatmulRecord

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

    weight: the `get_attr` node of its constant operand, None if it has none.
    flipped: the attribute is [K, N] and the operand its transpose.
    refusal: why it stays in float; None if it is to be quantized.
    config: the settings for this layer, overrides applied.
    """

    node: fx.Node
    layer: str
    weight: fx.Node | None
    flipped: bool
    refusal: str | None
    config: LobcqConfig

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
    def shape(self) -> tuple[int, int] | None:
        """(N, K) of a 2-D weight."""
        if self.weight is None or self.weight.meta["val"].dim() != 2:
            return None
        rows, columns = self.weight.meta["val"].shape
        return (columns, rows) if self.flipped else (rows, columns)

    def left_alone(self) -> MatmulRecord:
        """The inventory's record of a matmul that stays in float."""
        value = None if self.weight is None else self.weight.meta["val"]
        size = 0 if value is None else value.numel() * value.element_size()
        return MatmulRecord(
            self.layer, operation_name(self.node), self.shape, self.refusal, float_bytes=size, packed_bytes=size
        )


def find_matmuls(graph_module: fx.GraphModule, config: LobcqConfig) -> list[Matmul]:
    """Every matmul of the graph in execution order, those that cannot or must not be quantized with a refusal."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is aten.linear.default:
            found.append(_linear(node, config))
        elif node.target in _PRODUCTS:
            found.append(Matmul(node, module_path(node), None, False, _product_refusal(node), config))
        elif node.target in _UNSUPPORTED or "grouped_mm" in str(node.target):
            reason = _UNSUPPORTED.get(node.target, _UNSUPPORTED[aten._grouped_mm.default])
            found.append(Matmul(node, module_path(node), _attribute_among(node.args[1:]), False, reason, config))
    return found


def _attribute_among(arguments: Iterable[object]) -> fx.Node | None:
    """The first constant among the operands, seen through nodes of one input, such as a 3-D weight's transposes."""
    for node in arguments:
        while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return node
    return None


def _product_refusal(node: fx.Node) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    operands = node.args[_PRODUCTS[node.target]]
    if node.target is aten.addmm.default and constant_weight(operands[-1]):
        return _SCALED_ADDMM
    return _OTHER_FORM if any(constant_weight(operand) for operand in operands) else _ATTENTION


def _linear(node: fx.Node, config: LobcqConfig) -> Matmul:
    found = constant_weight(node.args[1])
    if found is None:
        return Matmul(node, module_path(node), None, False, "its weight is computed in the graph, not constant", config)
    weight, flipped = found
    layer = _layer_name(node, str(weight.target))
    settings = config.for_layer(layer)
    matmul = Matmul(node, layer, weight, flipped, None, settings)
    return Matmul(node, layer, weight, flipped, _refusal(matmul), settings)


def _refusal(matmul: Matmul) -> str | None:
    config, shape = matmul.config, matmul.shape
    assert matmul.weight is not None
    if shape is None:
        return "its weight is not 2-D"
    by_pattern = config.refusal(matmul.layer)
    if by_pattern is not None:
        return by_pattern
    if shape[1] < config.min_in_features:
        return f"too small: K = {shape[1]} is below min_in_features = {config.min_in_features}"
    dtype = matmul.weight.meta["val"].dtype
    return None if dtype in FLOAT_DTYPES else f"its weight is {dtype}; fp32, bf16 and fp16 are supported"


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
