"""Pass: bring every product with a constant 2-D weight into the one form `aten.linear(x, w, bias)`.

    addmm(bias, x, w)   ->  linear(x, t(w), bias)      GPT-2's Conv1D keeps w as [K, N]
    mm(x, w), matmul    ->  linear(x, t(w))
    mm(w, x), matmul    ->  transpose(linear(transpose(x), w))     token mixing
    mv(w, x)            ->  linear(x, w)
    t(t(w))             ->  w                          Falcon multiplies by a transposed parameter
    baddbmm(b, x, w)    ->  bmm(x, w) + b              w is a stack of matrices, each for its rows

Later passes match `linear` alone, its weight a `get_attr` or one `t` of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lobcq_fx.graph.attributes import add_call
from lobcq_fx.graph.operands import OPERATION, constant_weight, operation_name, transposed
from lobcq_fx.graph.strides import keep_views
from lobcq_fx.passes.infra import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class NormalizeMatmuls(GraphPass):
    """Rewrite `addmm`, `mm` and `matmul` with a constant 2-D weight into `linear`."""

    name: ClassVar[str] = "normalize_matmuls"

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Replace each match; `modified` is true if there was one."""
        modified = False
        columns = []
        for node in list(graph_module.graph.nodes):
            operands = _linear_operands(node)
            if operands is None and not _is_sum(node):
                continue
            with graph_module.graph.inserting_before(node):
                result = (
                    _sum(graph_module.graph, node) if operands is None else _linear(graph_module.graph, node, operands)
                )
            node.replace_all_uses_with(result)
            graph_module.graph.erase_node(node)
            columns += [result] if operands is not None and operands.columns else []
            modified = True
        if columns:
            keep_views(graph_module.graph, columns)
        return modified


def normal_form(graph_module: fx.GraphModule) -> str | None:
    """What passes after this one require: no product is left that it would rewrite."""
    for node in graph_module.graph.nodes:
        if _linear_operands(node) is not None or _is_sum(node):
            return f"{node.format_node()} is not in normal form: run normalize_matmuls first"
    return None


@dataclass(frozen=True)
class _Operands:
    """Operands of `linear`: its weight [N, K] is the attribute, or the attribute's transpose if `flipped`."""

    x: fx.Node
    weight: fx.Node
    flipped: bool
    bias: fx.Node | None
    columns: bool = False
    """x has the activations in its columns, and so has the result."""


def _linear(graph: fx.Graph, node: fx.Node, operands: _Operands) -> fx.Node:
    """The normal form of `node`, at the insertion point."""
    w = transposed(graph, operands.weight) if operands.flipped else operands.weight
    x = add_call(graph, aten.transpose.int, (operands.x, -2, -1), like=node) if operands.columns else operands.x
    args = (x, w) if operands.bias is None else (x, w, operands.bias)
    result = add_call(graph, aten.linear.default, args, like=node)
    result.meta[OPERATION] = operation_name(node)
    return add_call(graph, aten.transpose.int, (result, -2, -1), like=node) if operands.columns else result


def _linear_operands(node: fx.Node) -> _Operands | None:
    """How to write the node as a normal `linear`; None where the pass must not fire."""
    if node.op != "call_function" or node.kwargs:
        return None
    args: tuple[Any, ...] = node.args
    bias: fx.Node | None = None
    if node.target is aten.linear.default:
        x, w, bias = (*args, None)[:3]
    elif node.target is aten.addmm.default:
        bias, x, w = args
    elif node.target in (aten.mm.default, aten.matmul.default, aten.mv.default):
        x, w = args
        if constant_weight(x) is not None:
            return _constant_on_the_left(*args)
    else:
        return None
    found = constant_weight(w)
    if found is None or found[0].meta["val"].dim() != 2 or (bias is not None and bias.meta["val"].dim() != 1):
        return None
    weight, flipped = found
    if node.target is aten.linear.default:
        normal = w is weight or (flipped and w.args[0] is weight)
        return None if normal else _Operands(x, weight, flipped, bias)
    return _Operands(x, weight, not flipped, bias)


def _constant_on_the_left(w: Any, x: Any) -> _Operands | None:
    """Operands of w @ x, where x [K], [K, M] or [..., K, M] is no constant."""
    found = constant_weight(w)
    if found is None or found[0].meta["val"].dim() != 2 or constant_weight(x) is not None:
        return None
    return _Operands(x, *found, bias=None, columns=x.meta["val"].dim() > 1)


def _is_sum(node: fx.Node) -> bool:
    """Whether the node adds something to the products of an activation and a constant stack of matrices."""
    if node.op != "call_function" or node.target is not aten.baddbmm.default or node.kwargs:
        return False
    _, x, w = node.args
    found = constant_weight(w)
    return found is not None and found[0].meta["val"].dim() == 3 and constant_weight(x) is None


def _sum(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The products and the sum apart, at the insertion point."""
    products = add_call(graph, aten.bmm.default, node.args[1:], like=node)
    products.meta[OPERATION] = operation_name(node)
    return add_call(graph, aten.add.Tensor, (products, node.args[0]), like=node)
