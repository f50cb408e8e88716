"""Operators behind which an activation has the columns that it had: they move its rows, cast them or multiply them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

CASTS = (aten.to.dtype, aten.type_as.default)
_RESHAPES = (aten.view.default, aten.reshape.default)


def same_columns(node: fx.Node) -> fx.Node | None:
    """The operand [..., K] whose columns, each times a number for each row, the columns of a node are; None if none is.

    A scale [K] of the operand is one of the node then, too.
    """
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, args = node.args[0], node.args
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or not before.dim():
        return None
    floats = before.is_floating_point() and after.is_floating_point()
    if not floats or not after.dim() or _columns(before) is None or _columns(before) != _columns(after):
        return None
    if node.target in CASTS or node.target in _RESHAPES:
        return source
    if node.target is aten.index.Tensor:
        indices: Any = args[1]
        return source if len(indices) < before.dim() else None
    if node.target is aten.repeat.default:
        return source  # of the same number of columns: each once
    if node.target is aten.mul.Tensor and isinstance(args[1], fx.Node) and not node.kwargs:
        factor = args[1].meta["val"]
        return source if factor.dim() and _columns(factor) == 1 else None
    return None


def with_these_columns(activation: fx.Node) -> Iterator[fx.Node]:
    """An activation, and what it is made of by operators that leave columns alone, one after the other."""
    node: fx.Node | None = activation
    while node is not None:
        yield node
        node = same_columns(node)


def _columns(value: torch.Tensor) -> int | None:
    """The last size, None where it is not fixed."""
    last = value.shape[-1]
    return last if isinstance(last, int) else None
