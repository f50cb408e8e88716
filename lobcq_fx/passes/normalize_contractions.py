"""Pass: convolutions, einsums and batched products that are a matmul with a constant become `aten.linear`.

    conv2d(x, w, bias, stride)     ->  image(linear(rows(x), w as [N, C * kh * kw], bias))     no window overlaps
    einsum("ibh,hnd->ibnd", x, w)  ->  unflatten(linear(x, t(w as [h, n * d])))
    tensordot, addbmm              ->  likewise
    bmm(x, expand(w)), baddbmm     ->  linear(x, t(w)), and what is added

The constant is a matrix from here on, [N, K] or [K, N], under its own name where nothing reads it otherwise: in its own
memory, unless its dimensions have to be put in another order first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from lobcq_fx.graph.aliasing import written_attributes, written_between
from lobcq_fx.graph.attributes import add_beside, add_call, get_attr_node, get_attribute, replace_attribute
from lobcq_fx.graph.contraction import MATRIX, Contraction
from lobcq_fx.graph.convolutions import convolution
from lobcq_fx.graph.dead_code import erase_dead_nodes
from lobcq_fx.graph.einsums import einsum
from lobcq_fx.graph.operands import OPERATION, operation_name, readers_of, transposed
from lobcq_fx.graph.strides import keep_views
from lobcq_fx.passes.infra import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class NormalizeContractions(GraphPass):
    """Rewrite what is a matmul with a constant of any rank into `linear`, a matrix in the constant's place."""

    name: ClassVar[str] = "normalize_contractions"

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Replace each match; `modified` is true if there was one."""
        graph, written = graph_module.graph, set(written_attributes(graph_module.graph))
        matches = [convolution(node) or einsum(node) for node in graph.nodes]
        found = [one for one in matches if one is not None and str(one.weight.target) not in written]
        if not found:
            return False
        rows = _Rows(graph)
        results = []
        for one, (matrix, flipped) in zip(found, _matrices(graph_module, found), strict=True):
            with graph.inserting_before(one.node):
                results.append(_linear(graph, one, rows.of(one), matrix, flipped))
        for one, result in zip(found, results, strict=True):
            one.node.replace_all_uses_with(result)
            graph.erase_node(one.node)
        keep_views(graph, results)
        erase_dead_nodes(graph)
        return True


class _Rows:
    """Activations as rows, each once for all that read it so: linears of one activation can share its encoding."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[Any, ...], fx.Node] = {}

    def of(self, one: Contraction) -> fx.Node:
        """Those of a match, at the insertion point."""

        def call(target: Any, *args: Any) -> fx.Node:
            key = (target, *(tuple(arg) if isinstance(arg, list) else arg for arg in args))
            known = self._made.get(key)
            if known is None or written_between(known, one.node, [args[0]]):
                known = self._made[key] = add_call(self._graph, target, args, like=one.node)
            return known

        return one.activation(call)


def _linear(graph: fx.Graph, one: Contraction, rows: fx.Node, matrix: fx.Node, flipped: bool) -> fx.Node:
    """What gives the node's result, at the insertion point."""

    def call(target: Any, *args: Any) -> fx.Node:
        return add_call(graph, target, args, like=one.node)

    weight = transposed(graph, matrix) if flipped else matrix
    product = call(aten.linear.default, rows, weight, *(() if one.bias is None else (one.bias,)))
    product.meta[OPERATION] = operation_name(one.node)
    return one.result(call, product)


@dataclass(frozen=True)
class _Matrix:
    """A constant as a matrix: its dimensions in order, those of each side of the matrix; which of both K is."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    flipped: bool

    @classmethod
    def of(cls, one: Contraction) -> _Matrix:
        """[K, N] where the constant lies so, [N, K] otherwise."""
        order = one.columns + one.rows
        return cls(one.columns, one.rows, True) if order == tuple(sorted(order)) else cls(one.rows, one.columns, False)

    def made_of(self, constant: Tensor) -> Tensor:
        """The matrix, in the constant's memory where that is possible."""
        sizes = [prod(constant.shape[dim] for dim in dims) for dims in (self.first, self.second)]
        rest = [dim for dim in range(constant.dim()) if dim not in self.first + self.second]  # of size 1
        return constant.permute(*rest, *self.first, *self.second).reshape(sizes)


def _matrices(graph_module: fx.GraphModule, found: Sequence[Contraction]) -> list[tuple[fx.Node, bool]]:
    """For each match the node of its matrix, and whether that is [K, N]. Each matrix is made once."""
    wanted = [(str(one.weight.target), _Matrix.of(one)) for one in found]
    replaced = {one.node for one in found}
    made: dict[tuple[str, _Matrix], fx.Node] = {}
    for name, matrix in dict.fromkeys(wanted):
        alone = [one for other, one in dict.fromkeys(wanted) if other == name] == [matrix]
        others = readers_of(graph_module.graph, name) - replaced
        made[name, matrix] = _make(graph_module, name, matrix, beside=not alone or bool(others))
    return [(made[name, matrix], matrix.flipped) for name, matrix in wanted]


def _make(graph_module: fx.GraphModule, name: str, matrix: _Matrix, *, beside: bool) -> fx.Node:
    """A node of the matrix: of the constant itself where it is one, of another one beside it, or in its place."""
    constant = get_attribute(graph_module, name)
    value = matrix.made_of(constant.detach())
    same = constant.shape == value.shape and constant.stride() == value.stride()
    if beside and not same:
        return add_beside(graph_module, name, MATRIX, nn.Parameter(value, requires_grad=False))
    if not same:
        replace_attribute(graph_module, name, value)
    return get_attr_node(graph_module, name)
