"""Pass: complex numbers as pairs of real ones, for targets that have no others.

view_as_real(view_as_complex(x) * polar(1, angle))  ->  stack([a * cos - b * sin, a * sin + b * cos], -1)

Llama 4, DeepSeek-V2 and image transformers rotate queries and keys so. A complex tensor [...] becomes a real one
[..., 2], as `view_as_real` has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from lobcq_fx.graph.attributes import add_beside, add_call, delete_attribute, get_attribute
from lobcq_fx.passes.infra import GraphPass

aten = torch.ops.aten

PART_DTYPE = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
"""What the parts of complex numbers are."""

_Rule = Callable[..., fx.Node]
"""Writes what stands for a node, called with a `_Writer` and the node's arguments."""


@dataclass(frozen=True)
class RealArithmetic(GraphPass):
    """Rewrite all that is complex in a graph: products, sums, conjugates and views of complex tensors.

    A graph that does more with them, takes them as inputs or returns them stays as it is: `refusals` is filled with the
    first node that is not known here.
    """

    name: ClassVar[str] = "real_arithmetic"

    refusals: list[fx.Node] = field(default_factory=list, compare=False)

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every complex node, or none."""
        nodes = _complex_nodes(graph_module)
        if isinstance(nodes, fx.Node):
            self.refusals.append(nodes)
            return False
        writer = _Writer(graph_module)
        for node in nodes:
            writer.rewrite(node)
        for node in reversed(nodes):
            graph_module.graph.erase_node(node)
            if node.op == "get_attr" and not graph_module.graph.find_nodes(op="get_attr", target=node.target):
                delete_attribute(graph_module, str(node.target))
        return bool(nodes)


def _complex_nodes(graph_module: fx.GraphModule) -> list[fx.Node] | fx.Node:
    """Nodes that make or read complex tensors, in order; or the first of them that no rule is for."""
    found: list[fx.Node] = []
    made: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        reads = [one for one in node.all_input_nodes if one in made]
        if reads and node.target in _SINKS:
            found.append(node)
        elif _is_stored(graph_module, node) or (reads and _is_plain(node, reads)) or node.target in _SOURCES:
            found.append(node)
            made.add(node)
        elif reads or _has_complex_dtype(node) or node.target in _SINKS:
            unknown: fx.Node = node
            return unknown
    return found


def _is_stored(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    value = get_attribute(graph_module, str(node.target)) if node.op == "get_attr" else None
    return bool(isinstance(value, Tensor) and value.is_complex())


def _has_complex_dtype(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (isinstance(value, Tensor) and value.is_complex()) or any(dtype in PART_DTYPE for dtype in _dtypes(node))


def _dtypes(node: fx.Node) -> list[torch.dtype]:
    arguments = tree_leaves((node.args, node.kwargs))
    return [one for one in arguments if isinstance(one, torch.dtype)]


def _is_plain(node: fx.Node, reads: list[fx.Node]) -> bool:
    """Whether there is a rule for the node's target, and for its arguments."""
    if node.target not in _RULES:
        return False
    if node.target in _CASTS:
        return all(dtype in PART_DTYPE for dtype in _dtypes(node))
    if node.kwargs or any(isinstance(one, complex) for one in node.args):
        return False
    if node.target in _SUMS:
        return all(one in reads for one in node.args)
    if node.target is aten.cat.default:
        return reads == node.all_input_nodes
    return node.target is not aten.div.Tensor or node.args[1] not in reads


class _Writer:
    """Puts real nodes beside complex ones; `pairs` has what stands for each, [..., 2]."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module, self.graph = graph_module, graph_module.graph
        self.pairs: dict[fx.Node, fx.Node] = {}
        self.like: fx.Node

    def rewrite(self, node: fx.Node) -> None:
        """Write the node's pair, or replace it if it is real itself."""
        self.like = node
        if node.op == "get_attr":
            self.pairs[node] = self._stored(str(node.target))
            return
        with self.graph.inserting_before(node):
            if node.target in _SINKS:
                node.replace_all_uses_with(_SINKS[node.target](self, *node.args))
            else:
                rule = _SOURCES.get(node.target) or _RULES[node.target]
                self.pairs[node] = rule(self, *node.args, **node.kwargs)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node."""
        return add_call(self.graph, target, args, self.like, kwargs)

    def parts(self, node: fx.Node) -> list[fx.Node]:
        """The real and the imaginary part of a complex node."""
        return [self.call(aten.select.int, self.pairs[node], -1, index) for index in range(2)]

    def stack(self, real: fx.Node, imaginary: fx.Node) -> fx.Node:
        """Two parts as a pair."""
        return self.call(aten.stack.default, [real, imaginary], -1)

    def _stored(self, name: str) -> fx.Node:
        pairs = torch.view_as_real(get_attribute(self.graph_module, name).detach().resolve_conj()).contiguous()
        return add_beside(self.graph_module, name, "_pairs", pairs)


def _polar(writer: _Writer, length: fx.Node, angle: fx.Node) -> fx.Node:
    parts = (writer.call(target, angle) for target in (aten.cos.default, aten.sin.default))
    return writer.stack(*(writer.call(aten.mul.Tensor, length, part) for part in parts))


def _product(writer: _Writer, one: Any, other: Any) -> fx.Node:
    """Of two complex tensors, or of one and something real."""
    if one not in writer.pairs or other not in writer.pairs:
        pair, factor = (one, other) if one in writer.pairs else (other, one)
        return _scaled(writer, aten.mul.Tensor, pair, factor)
    (a, b), (c, d) = writer.parts(one), writer.parts(other)
    ac, bd, ad, bc = (writer.call(aten.mul.Tensor, *pair) for pair in ((a, c), (b, d), (a, d), (b, c)))
    return writer.stack(writer.call(aten.sub.Tensor, ac, bd), writer.call(aten.add.Tensor, ad, bc))


def _scaled(writer: _Writer, target: Any, pair: fx.Node, factor: Any) -> fx.Node:
    if isinstance(factor, fx.Node) and isinstance(factor.meta.get("val"), (Tensor, type(None))):  # no size
        factor = writer.call(aten.unsqueeze.default, factor, -1)
    return writer.call(target, writer.pairs[pair], factor)


def _conjugate(writer: _Writer, node: fx.Node) -> fx.Node:
    real, imaginary = writer.parts(node)
    return writer.stack(real, writer.call(aten.neg.default, imaginary))


def _part_dtype(argument: Any) -> Any:
    return PART_DTYPE.get(argument, argument) if isinstance(argument, torch.dtype) else argument


def _each(target: Any) -> _Rule:
    """What is done to both parts alike: sums, casts, copies, and what counts dimensions from the front."""

    def rule(writer: _Writer, *args: Any, **kwargs: Any) -> fx.Node:
        args, kwargs = fx.node.map_arg((args, kwargs), lambda one: writer.pairs.get(one, one))
        args, kwargs = map_aggregate((args, kwargs), _part_dtype)
        return writer.call(target, *args, **kwargs)

    return rule


def _along(target: Any, count: int) -> _Rule:
    """`count` dimensions after the tensor: those counted from the end lie one further from it."""

    def rule(writer: _Writer, tensor: Any, *args: Any) -> fx.Node:
        moved = [dim - 1 if dim < 0 else dim for dim in args[:count]]
        return _each(target)(writer, tensor, *moved, *args[count:])

    return rule


def _sized(target: Any) -> _Rule:
    return lambda writer, tensor, sizes: writer.call(target, writer.pairs[tensor], [*sizes, 2])


def _permuted(writer: _Writer, tensor: fx.Node, dims: list[int]) -> fx.Node:
    return writer.call(aten.permute.default, writer.pairs[tensor], [*(d - 1 if d < 0 else d for d in dims), -1])


_SOURCES: dict[Any, _Rule] = {
    aten.view_as_complex.default: lambda writer, pair: pair,
    aten.complex.default: _Writer.stack,
    aten.polar.default: _polar,
}
_SINKS: dict[Any, _Rule] = {
    aten.view_as_real.default: lambda writer, node: writer.pairs[node],
    aten.real.default: lambda writer, node: writer.parts(node)[0],
    aten.imag.default: lambda writer, node: writer.parts(node)[1],
}
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_CASTS = (
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.clone.default,
)  # fmt: skip
_RULES: dict[Any, _Rule] = {
    **{target: _each(target) for target in (*_SUMS, *_CASTS, aten.neg.default, aten.index.Tensor)},
    **{target: _along(target, 1) for target in (aten.unsqueeze.default, aten.select.int, aten.slice.Tensor)},
    **{target: _sized(target) for target in (aten.view.default, aten.reshape.default, aten.expand.default)},
    aten.cat.default: _along(aten.cat.default, 1),
    aten.transpose.int: _along(aten.transpose.int, 2),
    aten.permute.default: _permuted,
    aten.mul.Tensor: _product,
    aten.div.Tensor: lambda writer, node, divisor: _scaled(writer, aten.div.Tensor, node, divisor),
    aten._conj.default: _conjugate,
    aten.conj_physical.default: _conjugate,
}
