"""How many multiply-adds with a weight a node of a traced graph does, in the sizes of the traced example."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

KEPT = "logits_to_keep"
"""The input of language models that says which positions get logits; all of them are counted."""

Sizes = Mapping[Any, int]
"""Symbol of a traced size -> what it stands for."""


def example_sizes(graph: fx.Graph) -> dict[Any, int]:
    """What the symbols in a graph's metadata stand for in the example that it was traced with."""
    inputs = {str(node.target): node.meta.get("val") for node in graph.find_nodes(op="placeholder")}
    shapes = {name: list[Any](value.shape) for name, value in inputs.items() if isinstance(value, Tensor)}
    free = [size for shape in shapes.values() for size in shape if isinstance(size, torch.SymInt)]
    sizes = {size.node.expr: int(size.node.hint) for size in free if size.node.expr.is_symbol}
    if KEPT in shapes and "input_ids" in shapes and isinstance(shapes[KEPT][0], torch.SymInt):
        sizes[shapes[KEPT][0].node.expr] = _int(shapes["input_ids"][1], sizes)
    return sizes


class _DependsOnValuesError(Exception):
    """A size is none of the shapes that the example has, but follows from its values."""


def multiply_adds(node: fx.Node, weight: fx.Node, sizes: Sizes) -> int | None:
    """Those of a node that reads a constant operand; None where a size depends on values, as an expert's tokens may.

    Args:
        node: a matmul, a convolution, a recurrent layer, or an einsum.
        weight: what its constant operand is made of.
        sizes: from `example_sizes`.
    """
    try:
        return _counted(node, weight, sizes)
    except _DependsOnValuesError:
        return None


def elements(node: fx.Node, sizes: Sizes) -> int | None:
    """Scalars that a node gives; None where that depends on values."""
    try:
        return prod(_shape(node, sizes))
    except _DependsOnValuesError:
        return None


def _counted(node: fx.Node, weight: fx.Node, sizes: Sizes) -> int:
    out, x, w = (_shape(value, sizes) for value in (node, _first_tensor(node, weight), weight))
    name = str(node.target)
    if "conv_transpose" in name or _is_transposed_convolution(node):
        return prod(x) * prod(w[1:])
    if "conv" in name or "bilinear" in name:
        return prod(out) * prod(w[1:])
    if any(kind in name for kind in ("lstm", "gru", "rnn", "transformer_encoder_layer", "multi_head_attention")):
        matrices = [_shape(one, sizes) for one in node.all_input_nodes if one.op == "get_attr"]
        return prod(x[:-1]) * sum(prod(shape) for shape in matrices if len(shape) > 1)
    if node.target is aten.einsum.default:
        return _einsum(node, sizes)
    # A product: the operand before the constant one, or the constant itself where it stands on the left.
    return prod(out) * _shape(_left_operand(node), sizes)[-1]


def _einsum(node: fx.Node, sizes: Sizes) -> int:
    """The sizes of all indices, each once; an ellipsis stands for what the result has besides."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    assert isinstance(operands, (list, tuple))
    inputs, _, result = equation.partition("->")
    by_index: dict[str, int] = {}
    for indices, operand in zip(inputs.split(","), operands, strict=True):
        letters, shape = indices.replace("...", ""), _shape(operand, sizes)
        by_index |= dict(zip(reversed(letters), reversed(shape), strict=False))
    named = prod(by_index[letter] for letter in result if letter in by_index)
    return prod(by_index.values()) * max(1, prod(_shape(node, sizes)) // max(1, named))


def _left_operand(node: fx.Node) -> Any:
    with_bias = node.target in (aten.addmm.default, aten.baddbmm.default)
    return node.args[1] if with_bias else node.args[0]


def _first_tensor(node: fx.Node, weight: fx.Node) -> Any:
    return next((one for one in node.all_input_nodes if one is not weight), node)


def _is_transposed_convolution(node: fx.Node) -> bool:
    return node.target is aten.convolution.default and node.args[6] is True


def _shape(node: Any, sizes: Sizes) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    value = value[0] if isinstance(value, (tuple, list)) else value
    return tuple(_int(size, sizes) for size in value.shape) if isinstance(value, Tensor) else ()


def _int(size: Any, sizes: Sizes) -> int:
    if isinstance(size, int):
        return size
    found = size.node.expr.subs(sizes)
    if not found.is_number:
        raise _DependsOnValuesError
    return int(found)
