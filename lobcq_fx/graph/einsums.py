"""Sums of products over indices (`einsum`, `tensordot`, batched products): which are matmuls with a constant."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lobcq_fx.graph.contraction import Contraction, rank
from lobcq_fx.graph.operands import constant_weight, is_stack_of_one, is_transpose
from lobcq_fx.modules.windows import Call

aten = torch.ops.aten

_BATCHED = (aten.bmm.default, aten.baddbmm.default, aten.matmul.default)


@dataclass(frozen=True)
class Einsum(Contraction):
    """A sum of products of an activation and a constant over the indices that the result lacks.

    indices: of the activation. summed: those that are summed over, in the order of K. kept: the constant's that are
    not, in the order of N, each with its size. out: of the result. added: what is added to that, or None.
    """

    indices: str
    summed: str
    kept: tuple[tuple[str, int], ...]
    out: str
    added: fx.Node | None = None

    @property
    def _rest(self) -> str:
        return "".join(index for index in self.indices if index not in self.summed)

    def activation(self, call: Call) -> fx.Node:
        """With the indices that are summed over at the end, as one."""
        x = _permuted(call, self.x, self.indices, self._rest + self.summed)
        rows: fx.Node = x if len(self.summed) == 1 else call(aten.flatten.using_ints, x, len(self._rest))
        return rows

    def result(self, call: Call, rows: fx.Node) -> fx.Node:
        """With the constant's indices apart again."""
        if len(self.kept) != 1:
            rows = call(aten.unflatten.int, rows, -1, [size for _, size in self.kept])
        y = _permuted(call, rows, self._rest + "".join(index for index, _ in self.kept), self.out)
        total: fx.Node = y if self.added is None else call(aten.add.Tensor, y, self.added)
        return total


def einsum(node: fx.Node) -> Einsum | None:
    """A node as a matmul, if it is one whose weight is a constant."""
    if node.op != "call_function":
        return None
    if node.target in _BATCHED:
        return _of_one_matrix(node)
    written = _written(node)
    if written is None:
        return None
    indices, operands, out, added = written
    constant = [constant_weight(operand) is not None for operand in operands]
    if sum(constant) != 1:
        return None
    place = constant.index(True)
    return _contraction(node, operands[1 - place], indices[1 - place], operands[place], indices[place], out, added)


_Written = tuple[list[str], list[fx.Node], str, fx.Node | None]
"""Indices of the operands, the operands, indices of the result, and what is added to that."""


def _written(node: fx.Node) -> _Written | None:
    """A node as a sum of products of two operands; None for others, and for what has an index twice in an operand."""
    if node.kwargs and node.target is not aten.einsum.default:
        return None  # addbmm with factors
    args: tuple[Any, ...] = node.args
    if node.target is aten.einsum.default and len(args[1]) == 2:
        found = _equation(str(args[0]).replace(" ", ""), [rank(operand) for operand in args[1]])
        return None if found is None else (found[0], list(args[1]), found[1], None)
    if node.target is aten.tensordot.default:
        x, w, left, right = args
        first = list(ascii_letters[: rank(x)])
        second = list(ascii_letters[rank(x) : rank(x) + rank(w)])
        for one, other in zip(left, right, strict=True):
            second[other] = first[one]
        out = [index for index in first if index not in second] + [index for index in second if index not in first]
        return ["".join(first), "".join(second)], [x, w], "".join(out), None
    if node.target is aten.addbmm.default:
        return ["bmk", "bkn"], list(args[1:]), "mn", args[0]
    return None


def _equation(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """The indices of each operand and of the result, an ellipsis written out."""
    left, arrow, out = equation.partition("->")
    operands = left.split(",")
    spare = [index for index in ascii_letters if index not in equation]
    dots = [count - len(operand.replace("...", "")) for operand, count in zip(operands, ranks, strict=True)]
    most = max(dots)
    if len(spare) < most:
        return None
    for place, (operand, count) in enumerate(zip(operands, dots, strict=True)):
        operands[place] = operand.replace("...", "".join(spare[most - count : most]))
    if arrow:
        out = out.replace("...", "".join(spare[:most]))
    else:
        once = [index for index, count in Counter(left.replace(",", "").replace(".", "")).items() if count == 1]
        out = "".join(spare[:most] + sorted(once))
    if any(len(set(indices)) != len(indices) for indices in (*operands, out)):
        return None
    return operands, out


def _contraction(
    node: fx.Node, x: fx.Node, indices: str, operand: fx.Node, named: str, out: str, added: fx.Node | None
) -> Einsum | None:
    found = constant_weight(operand)
    assert found is not None
    weight, flipped = found
    if flipped:
        named = named[:-2] + named[:-3:-1]
    if set(indices) - set(out) - set(named):
        return None  # it is summed over an index of the activation alone
    columns = [place for place, index in enumerate(named) if index in indices]
    rows = [place for place, index in enumerate(named) if index in out]
    shape, given = weight.meta["val"].shape, x.meta["val"].shape
    met = [given[indices.index(named[place])] for place in columns]
    fits = all(statically_known_true(size == shape[place]) for size, place in zip(met, columns, strict=True))
    if not (rows and columns and fits) or len(rows) + len(columns) != len(named):
        return None  # a vector, a broadcast size, a matrix for each index, or a sum over an index of the constant alone
    kept = tuple((named[place], int(shape[place])) for place in rows)
    summed = "".join(named[place] for place in columns)
    return Einsum(node, x, weight, tuple(rows), tuple(columns), None, indices, summed, kept, out, added)


def _of_one_matrix(node: fx.Node) -> Einsum | None:
    """A batched product in which one matrix serves the whole batch."""
    operands: list[Any] = [*(() if node.target is aten.baddbmm.default else (None,)), *node.args]
    added, x, w = operands
    found = None if node.kwargs else _one_matrix(w)
    if found is None or rank(x) < 3:
        return None
    weight, flipped = found
    last = rank(weight) - 1
    row, column = (last - 1, last) if flipped else (last, last - 1)
    indices, new = ascii_letters[: rank(x)], ascii_letters[rank(x)]
    kept = ((new, int(weight.meta["val"].shape[row])),)
    return Einsum(node, x, weight, (row,), (column,), None, indices, indices[-1], kept, indices[:-1] + new, added)


def _one_matrix(operand: Any) -> tuple[fx.Node, bool] | None:
    """The constant behind a stack [B, K, N] of one matrix over and over, [K, N] or [1, K, N]; whether it is flipped."""
    node, flipped, repeated = operand, False, False
    while isinstance(node, fx.Node) and node.op == "call_function":
        if is_transpose(node):
            flipped = not flipped
        elif is_stack_of_one(node):
            repeated = True
        else:
            return None
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    shape = node.meta["val"].shape
    alone = len(shape) == 3 and shape[0] == 1
    return (node, flipped) if alone or (repeated and len(shape) == 2) else None


def _permuted(call: Call, x: Any, before: str, after: str) -> Any:
    return x if before == after else call(aten.permute.default, x, [before.index(index) for index in after])
