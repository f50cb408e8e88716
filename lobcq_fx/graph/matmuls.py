"""Find every matmul of a normalized graph, and say of each whether its form allows quantizing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lobcq_fx.graph.attributes import named_arguments
from lobcq_fx.graph.contraction import MATRIX
from lobcq_fx.graph.convolutions import CONVOLUTIONS, windows
from lobcq_fx.graph.operands import constant_nodes, constant_weight, made_of

aten = torch.ops.aten

# Products that normalize_matmuls left as they are -> their two operands' positions.
_PRODUCTS = {
    aten.matmul.default: slice(0, 2),
    aten.mm.default: slice(0, 2),
    aten.mv.default: slice(0, 2),
    aten.bmm.default: slice(0, 2),
    aten.baddbmm.default: slice(1, 3),
    aten.addmm.default: slice(1, 3),
    aten.scaled_dot_product_attention.default: slice(0, 3),
}
_CONVOLUTION = "a convolution, not a matmul"  # where its settings do not say why: one of a computed weight
_TRANSPOSED = "a transposed convolution, not a matmul"
_RECURRENT = "a recurrent layer, which multiplies step by step"
_GROUPED = "a grouped product in another form than rows [T, K] by weights [E, K, N], with offsets and nothing else"
_FUSED = "a fused layer that hides its matmuls: torch.backends.mha.set_fastpath_enabled(False) before quantizing"
_INDICES = "its indices are not those of rows [..., K] times one constant matrix [N, K]"
_UNSUPPORTED = {
    **dict.fromkeys(("einsum", "tensordot", "addbmm"), _INDICES),
    "bilinear": "a bilinear form of two activations",
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _CONVOLUTION),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _TRANSPOSED),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _RECURRENT),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _RECURRENT),
    **dict.fromkeys(("_transformer_encoder_layer_fwd", "_native_multi_head_attention"), _FUSED),
}
"""What multiplies by weights in a form that is left alone: operators by name, and why."""

_ATTENTION = "activation x activation, no constant weight"
_OTHER_FORM = "its constant operand is not a 2-D weight on the right"
_SCALED_ADDMM = "addmm with a bias that is not one value per output, or with beta or alpha other than 1"


@dataclass(frozen=True)
class Matmul:
    """A matmul node and what the passes need to know of it.

    layer: module path of its weight's owner, or of the module that runs it.
    weight: the `get_attr` node of its constant operand, the first where it has several, None if it has none.
    constants: every matrix among the constants that its operands are made of.
    flipped: the attribute is [K, N], or [E, K, N], and the weight its transpose.
    obstacle: why its form forbids quantizing it; None where it is a `linear` with a constant weight, or a grouped one.
    grouped: each of E groups of rows meets a matrix of its own: its weight is [E, N, K].
    offsets: where the groups end, int32 [E]; None where the activation is [E, M, K], or nothing is grouped.
    """

    node: fx.Node
    layer: str
    weight: fx.Node | None
    flipped: bool
    obstacle: str | None
    constants: tuple[fx.Node, ...]
    grouped: bool = False
    offsets: fx.Node | None = None

    @property
    def activation(self) -> fx.Node:
        """The operand [..., K] that is not constant."""
        x = self.node.args[0]
        assert isinstance(x, fx.Node)
        return x

    @property
    def bias(self) -> fx.Node | None:
        """The bias operand [N], or None."""
        bias = self.node.args[2] if len(self.node.args) > 2 and not self.grouped else None
        assert bias is None or isinstance(bias, fx.Node)
        return bias

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(N, K), or (E, N, K), of a weight; the shape of any other constant as it is; None without one."""
        if self.weight is None:
            return None
        shape = tuple(self.weight.meta["val"].shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.flipped else shape


def find_matmuls(graph_module: fx.GraphModule) -> list[Matmul]:
    """Every matmul of the graph in execution order, and all else that multiplies by weights."""
    found, constant = [], constant_nodes(graph_module.graph)
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        unsupported, grouped = _unsupported(node, constant), _grouped(node, constant)
        if node.target is aten.linear.default:
            found.append(_linear(node, constant))
        elif node.target is aten.scaled_dot_product_attention.default:  # its mask may be constant, and is no weight
            found.append(Matmul(node, module_path(node), None, False, _ATTENTION, ()))
        elif grouped is not None:
            found.append(grouped)
        elif node.target in _PRODUCTS:
            found.append(
                _left_alone(node, node.args[_PRODUCTS[node.target]], _product_obstacle(node, constant), constant)
            )
        elif unsupported is not None:
            found.append(_left_alone(node, [node.args, node.kwargs], unsupported, constant))
    return found


def _grouped(node: fx.Node, constant: set[fx.Node]) -> Matmul | None:
    """Products of groups of rows and the matrices of a stack, as mixtures of experts have them."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if "grouped_mm" in node.target.name():  # torch's, and transformers' where torch has none for the dtype
        given = list(named_arguments(node).values())
        offsets = given[2] if len(given) > 2 else None
        plain = isinstance(offsets, fx.Node) and all(one is None for one in given[3:])
    elif node.target is aten.bmm.default:
        given, offsets, plain = list(node.args), None, node.args[0] not in constant
    else:
        return None
    found = constant_weight(given[1])
    if node.target is aten.bmm.default and (found is None or not plain):
        return None  # attention, or a form that has its own reason
    dims = [one.meta["val"].dim() for one in given[:2]]
    if found is None or not plain or dims != [3 if offsets is None else 2, 3]:
        return _left_alone(node, given[1], _GROUPED, constant)
    weight, flipped = found
    layer = _layer_name(node, str(weight.target))
    return Matmul(node, layer, weight, not flipped, None, (weight,), grouped=True, offsets=offsets)


def _unsupported(node: fx.Node, constant: set[fx.Node]) -> str | None:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return None
    reason = _UNSUPPORTED.get(node.target._schema.name.removeprefix("aten::"))
    if reason is _INDICES and constant.isdisjoint(node.all_input_nodes):
        return _ATTENTION
    found = windows(node) if node.target in CONVOLUTIONS else reason
    return found if isinstance(found, str) else reason


def _left_alone(node: fx.Node, operands: Any, obstacle: str, constant: set[fx.Node]) -> Matmul:
    read: list[fx.Node] = []
    fx.node.map_arg(operands, lambda operand: read.extend(made_of(operand) if operand in constant else ()))
    attributes = [one for one in read if one.op == "get_attr"]
    matrices = tuple(dict.fromkeys(one for one in attributes if one.meta["val"].dim() > 1))
    return Matmul(node, module_path(node), matrices[0] if matrices else None, False, obstacle, matrices)


def _product_obstacle(node: fx.Node, constant: set[fx.Node]) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    operands = node.args[_PRODUCTS[node.target]]
    if node.target is aten.addmm.default and constant_weight(operands[-1]):
        return _SCALED_ADDMM
    return _OTHER_FORM if any(operand in constant for operand in operands) else _ATTENTION


def _linear(node: fx.Node, constant: set[fx.Node]) -> Matmul:
    found = constant_weight(node.args[1])
    if found is None:
        return _left_alone(node, node.args[1], "its weight is computed in the graph, not constant", constant)
    weight, flipped = found
    return Matmul(node, _layer_name(node, str(weight.target)), weight, flipped, None, (weight,))


def _layer_name(node: fx.Node, weight: str) -> str:
    """The weight's module. A tied weight carries one owner's name: then the module that runs the matmul."""
    path = module_path(node)
    if path and not weight.startswith(path + "."):
        return path
    return weight.removesuffix(MATRIX).removesuffix(".weight")


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that was running when the node was traced; "" if unknown."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""
