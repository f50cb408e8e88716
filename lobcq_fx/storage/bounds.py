"""How large a graph of a file may be, and the numbers that it computes from sizes: the file may come from anyone.

Python's integers have no largest one: `n * n`, forty times over, takes longer than anybody waits. Every number that
follows from sizes therefore gets a bound, in bits, before the graph runs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lobcq_fx.errors import CheckpointError

MOST_NODES = 200_000
"""Of one graph. That of an 80-layer Llama has five thousand."""

DEEPEST_ARGUMENT = 8
"""Lists within lists among a node's arguments."""

LONGEST_TEXT = 1000
"""Characters of a name, or of an argument that is text."""

INTEGER_BITS = 63
SIZE_BITS = 48
"""Of a size, or of a number that an operator returns: more bytes than that no machine addresses."""

NUMBER_BITS = 1024
"""Of a number that is computed from sizes: a product of twenty of them."""

LARGEST_EXPONENT = 64

_SUMS = (operator.add, operator.sub)
_DIVISIONS = (operator.floordiv, operator.mod, operator.truediv, math.ceil, math.floor, math.trunc, torch.sym_int)
_CHOICES = (operator.neg, torch.sym_max, torch.sym_min, torch.sym_ite)
_SHORT = (
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_),
    *(operator.not_, torch.sym_not),
)

SYMBOLIC: dict[str, Callable[..., Any]] = {
    f"{function.__module__.removeprefix('_')}.{function.__name__}": function
    for function in (operator.mul, operator.pow, torch.sym_float, *_SUMS, *_DIVISIONS, *_CHOICES, *_SHORT)
}
"""Arithmetic on sizes by the names that files have for it; all of it is bounded here."""


def check_scalar(value: Any) -> None:
    """Refuse an integer that torch has no room for, and a text that is longer than any name or option.

    Raises:
        ValueError: says which.
    """
    if isinstance(value, int) and value.bit_length() > INTEGER_BITS:
        raise ValueError(f"an integer has {value.bit_length()} bits, at most {INTEGER_BITS} are allowed")
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise ValueError(f"a text has {len(value):,} characters, at most {LONGEST_TEXT:,} are allowed")


def check_numbers(graph: fx.Graph) -> None:
    """Bound every number that the graph computes from sizes.

    Raises:
        CheckpointError: names the node whose value is no number, or may become too large.
    """
    bits: dict[fx.Node, int] = {}
    functions = set(SYMBOLIC.values())
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in functions:
            if _returns_number(node):
                bits[node] = SIZE_BITS
            continue
        try:
            bits[node] = _bits(node.target, [_bits_of(argument, bits) for argument in node.args], node.args)
        except ValueError as error:
            raise CheckpointError(f"graph.json: node {node.name!r}: {error}") from None
        if bits[node] > NUMBER_BITS or node.kwargs:
            raise CheckpointError(f"graph.json: node {node.name!r} computes a number of up to {bits[node]:,} bits")


def _returns_number(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    results = node.target._schema.returns
    return len(results) == 1 and str(results[0].type) in ("int", "SymInt", "float", "number", "Scalar", "bool")


def _bits_of(argument: Any, bits: dict[fx.Node, int]) -> int:
    if isinstance(argument, fx.Node) and argument in bits:
        return bits[argument]
    if isinstance(argument, int):
        return argument.bit_length()
    if isinstance(argument, float):
        return SIZE_BITS
    raise ValueError(f"{argument!r} is no number")


def _bits(function: Any, operands: list[int], arguments: tuple[Any, ...]) -> int:
    """How many bits a result may have whose operands have so many."""
    if function is operator.mul:
        return sum(operands)
    if function is operator.pow:
        exponent = arguments[1] if len(arguments) == 2 else None
        if not isinstance(exponent, (int, float)) or abs(exponent) > LARGEST_EXPONENT:
            raise ValueError(f"the exponent is {exponent!r}, not a number of at most {LARGEST_EXPONENT}")
        return max(1, operands[0]) * max(1, math.ceil(abs(exponent)))
    if function in _SHORT:
        return 1
    return max(operands, default=0) + (function in _SUMS)
