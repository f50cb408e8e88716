"""Conditions on the sizes of a graph's inputs, checked on every call: a graph gives wrong results, not errors.

A condition is a tree of lists, so that it can be written as JSON and never has to be run as code:
`[">=", ["size", 0, 1], 5]` asks that dimension 1 of input 0 is at least 5. It becomes Python closures once, when the
guards are made; they look at sizes alone, and Dynamo traces them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lobcq_fx.errors import CallError

SIZE = "size"
"""Head of a leaf: `["size", input, dimension]`."""

DEEPEST, MOST_PARTS = 100, 5000
"""Levels and parts of a condition that is read from a file."""

_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "min": min,
    "max": max,
}
_RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_LOGIC = ("and", "or")
_CALLS = ("min", "max")

_Check = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True)
class SizeGuards:
    """What must hold of the sizes of a graph's inputs.

    conditions: trees of lists. A relation (`==`, `!=`, `<`, `<=`, `>`, `>=`) of two numbers, or `and`, `or` of two
        conditions. A number is an int, a size, or `+`, `-`, `*`, `//`, `%`, `min`, `max` of two numbers.
    """

    conditions: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_checks", tuple(_condition(tree) for tree in self.conditions))

    def __reduce__(self) -> tuple[Any, ...]:
        return SizeGuards, (self.conditions,)  # closures are neither pickled nor copied

    def check(self, tensors: Sequence[Tensor], name: Callable[[int], str]) -> None:
        """Refuse tensors of other sizes.

        Args:
            tensors: the graph's inputs.
            name: what the caller calls an input.

        Raises:
            CallError: names the argument, the dimension, its size and the condition that does not hold.
        """
        checks: tuple[_Check, ...] = self._checks  # type: ignore[attr-defined]
        for place, holds in enumerate(checks):
            if not holds(tensors):
                raise CallError(_explain(self.conditions[place], tensors, name))

    def validate(self, ranks: Sequence[int]) -> None:
        """Raise a ValueError where a condition is about a size that inputs of these ranks do not have."""
        for tree in self.conditions:
            for place, dim in _sizes(tree):
                if place >= len(ranks) or dim >= ranks[place]:
                    raise ValueError(f"a size guard is about dimension {dim} of input {place}, which does not exist")

    def among(self, count: int) -> SizeGuards:
        """The conditions that are about the first `count` inputs alone."""
        return SizeGuards(tuple(tree for tree in self.conditions if all(place < count for place, _ in _sizes(tree))))

    def without(self, place: int) -> SizeGuards:
        """For a graph without the input at `place`: conditions about it go, inputs behind it move up."""
        others = [tree for tree in self.conditions if all(one != place for one, _ in _sizes(tree))]
        return SizeGuards(tuple(_moved(tree, place, -1) for tree in others))

    def behind(self, count: int) -> SizeGuards:
        """For a graph with `count` more inputs before these."""
        return SizeGuards(tuple(_moved(tree, -1, count) for tree in self.conditions))

    def to_list(self) -> list[Any]:
        """JSON-ready conditions."""
        return list(self.conditions)

    @classmethod
    def from_list(cls, trees: Any) -> SizeGuards:
        """Inverse of `to_list`.

        Raises:
            ValueError: a tree that is no condition.
        """
        if not isinstance(trees, list):
            raise ValueError(f"size guards are {trees!r}, no list")
        for tree in trees:
            _check_extent(tree)
        return cls(tuple(trees))


def _check_extent(tree: Any) -> None:
    """Refuse what would take long to compute, or more levels than Python's stack has.

    Raises:
        ValueError: says what there is too much of.
    """
    levels, count = [(tree, 0)], 0
    while levels:
        part, depth = levels.pop()
        count += 1
        if depth > DEEPEST or count > MOST_PARTS:
            raise ValueError(f"a size guard has more than {DEEPEST} levels, or more than {MOST_PARTS} parts")
        if isinstance(part, int) and part.bit_length() > 63:
            raise ValueError(f"a size guard has a number of {part.bit_length()} bits, which no size has")
        if isinstance(part, list):
            levels.extend((one, depth + 1) for one in part)


def _moved(tree: Any, place: int, by: int) -> Any:
    """A condition on inputs of which those behind `place` are elsewhere."""
    match tree:
        case int():
            return tree
        case [head, int(one), int(dim)] if head == SIZE:
            return [head, one + by * (one > place), dim]
    return [tree[0], *(_moved(part, place, by) for part in tree[1:])]


def describe(tree: Any, name: Callable[[int], str]) -> str:
    """A condition as Python would write it, for example `x.shape[1] >= 5`."""
    match tree:
        case int():
            return str(tree)
        case [head, int(place), int(dim)] if head == SIZE:
            return f"{name(place)}.shape[{dim}]"
    head, left, right = tree
    if head in _CALLS:
        return f"{head}({describe(left, name)}, {describe(right, name)})"
    parts = (_in_brackets(part, describe(part, name), head) for part in (left, right))
    return f" {head} ".join(parts)


def _in_brackets(tree: Any, text: str, outer: str) -> str:
    """Brackets where the tree is an operation within arithmetic; relations bind weaker than that anyway."""
    compound = isinstance(tree, list) and tree[0] not in (SIZE, *_CALLS)
    return f"({text})" if compound and (outer in _ARITHMETIC or outer in _LOGIC) else text


def _explain(tree: Any, tensors: Sequence[Tensor], name: Callable[[int], str]) -> str:
    sizes = " and ".join(
        f"argument {name(place)} has size {tensors[place].shape[dim]} in dimension {dim}" for place, dim in _sizes(tree)
    )
    return (
        f"{sizes}; the graph was traced with sizes for which {describe(tree, name)}, and for others the model may do"
        " something else: quantize again with example_inputs of that size"
    )


def _sizes(tree: Any) -> list[tuple[int, int]]:
    """(input, dimension) of every size in a tree, each once."""
    if isinstance(tree, int):
        return []
    if tree[0] == SIZE:
        return [(tree[1], tree[2])]
    return list(dict.fromkeys(size for part in tree[1:] for size in _sizes(part)))


def _condition(tree: Any) -> _Check:
    """A closure that says whether a condition holds.

    Raises:
        ValueError: it is no condition.
    """
    match tree:
        case [str(head), left, right] if head in _RELATIONS:
            return _relation(_RELATIONS[head], _number(left), _number(right))
        case ["and", left, right]:
            one, other = _condition(left), _condition(right)
            return lambda tensors: one(tensors) and other(tensors)
        case ["or", left, right]:
            one, other = _condition(left), _condition(right)
            return lambda tensors: one(tensors) or other(tensors)
    raise ValueError(f"{tree!r} is no condition on sizes")


def _relation(function: Callable[[Any, Any], Any], left: _Check, right: _Check) -> _Check:
    def holds(tensors: Sequence[Tensor]) -> Any:
        try:
            return function(left(tensors), right(tensors))
        except ZeroDivisionError:  # an empty tensor, of which the example says nothing
            return False

    return holds


def _number(tree: Any) -> _Check:
    match tree:
        case bool():
            pass
        case int():
            return lambda tensors: tree
        case ["size", int(place), int(dim)] if place >= 0 and dim >= 0 and bool not in (type(place), type(dim)):
            return lambda tensors: tensors[place].shape[dim]
        case [str(head), left, right] if head in _ARITHMETIC:
            function, one, other = _ARITHMETIC[head], _number(left), _number(right)
            return lambda tensors: function(one(tensors), other(tensors))
    raise ValueError(f"{tree!r} is no number in a condition on sizes")
