"""Tokens on their way to the experts of a mixture, as traced graphs gather them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lobcq_fx.graph.aliasing import written_between

aten = torch.ops.aten

_ORDERS = (aten.sort.default, aten.sort.stable, aten.topk.default)
"""Operators whose second result says where their input had the elements of the first."""


def before_dispatch(activation: fx.Node, reader: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What an activation [S, K] that `reader` reads is gathered from, and how: [T, K], and the rows taken, int64 [S].

    A token that several experts want can then be encoded once. Where the activation is no gather of rows, where a row
    may be counted from the end, or where something writes to what was gathered, it is itself, and all its rows.
    """
    node = activation
    while node.target is aten.to.dtype and isinstance(node.args[0], fx.Node) and _same_dtype(node, node.args[0]):
        node = node.args[0]
    if node.target is not aten.index.Tensor:
        return activation, None
    source, indices = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(indices, (list, tuple))
    (rows, *more) = indices
    if more or not isinstance(rows, fx.Node) or not _are_positions(rows) or source.meta["val"].dim() != 2:
        return activation, None
    written = written_between(node, reader, [source, rows])
    return (activation, None) if written else (source, rows)


def _same_dtype(one: fx.Node, other: fx.Node) -> bool:
    return bool(one.meta["val"].dtype == other.meta["val"].dtype)


def _are_positions(rows: fx.Node) -> bool:
    """Whether a node holds numbers int64 [S] of rows that exist, by the operators that made it: none is negative."""
    value = rows.meta["val"]
    if value.dim() != 1 or value.dtype != torch.int64:
        return False
    args: tuple[Any, ...] = rows.args
    if rows.target is aten.floor_divide.default and isinstance(args[1], int) and args[1] > 0:
        return _are_positions(args[0])
    if rows.target is aten.argsort.default:
        return True
    return rows.target is operator.getitem and args[1] == 1 and args[0].target in _ORDERS
