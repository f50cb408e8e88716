"""Pass: attention reads each key and value head where it lies, instead of a copy for every query head that shares it.

sdpa(q, reshape(expand(unsqueeze(k, 2))), reshape(expand(unsqueeze(v, 2))))  ->  sdpa(q, k, v, enable_gqa=True)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lobcq_fx.graph.attributes import add_call
from lobcq_fx.graph.dead_code import erase_dead_nodes
from lobcq_fx.passes.infra import GraphPass

aten = torch.ops.aten

HEADS, GROUPS = 1, 2
"""Dimension of the heads, and where `unsqueeze` puts that of the query heads for each of them."""


@dataclass(frozen=True)
class GroupQueryHeads(GraphPass):
    """Undo `repeat_kv`, which copies the whole cache on every call, where it feeds `scaled_dot_product_attention`.

    For devices whose fused attention takes grouped heads together with a mask: the CPU's does, to the same bits. A call
    whose key and value are not repeated alike, head for head, stays as it is.
    """

    name: ClassVar[str] = "group_query_heads"

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every attention of the graph; the copies that nothing reads then go."""
        graph, modified = graph_module.graph, False
        for node in list(graph.nodes):
            if node.target is not aten.scaled_dot_product_attention.default or node.kwargs.get("enable_gqa"):
                continue
            query, key, value, *rest = node.args
            key_sizes, value_sizes = _repeated_sizes(key), _repeated_sizes(value)
            if key_sizes is None or value_sizes is None or key_sizes[HEADS] != value_sizes[HEADS]:
                continue
            with graph.inserting_before(node):
                one, other = _unrepeated(graph, key, key_sizes), _unrepeated(graph, value, value_sizes)
            node.args = (query, one, other, *rest)
            node.kwargs = {**node.kwargs, "enable_gqa": True}
            modified = True
        if modified:
            erase_dead_nodes(graph)
        return modified


def _unrepeated(graph: fx.Graph, node: fx.Node, sizes: list[Any]) -> fx.Node:
    """What `node` repeats, expanded to its own sizes: a view in any case, and right whatever a graph may broadcast."""
    source = _unsqueezed(node.args[0].args[0])  # type: ignore[union-attr]
    assert source is not None
    return add_call(graph, aten.expand.default, (source, sizes), like=node)


def _repeated_sizes(node: Any) -> list[Any] | None:
    """[B, H, T, D] of the tensor whose heads `node` [B, H * G, T, D] repeats G times each, as the graph has them."""
    if not isinstance(node, fx.Node) or node.target not in (aten.reshape.default, aten.view.default):
        return None
    expand, merged = node.args
    if not isinstance(expand, fx.Node) or expand.target is not aten.expand.default:
        return None
    sizes: list[Any] = list(expand.args[1])  # type: ignore[arg-type]
    if _unsqueezed(expand.args[0]) is None or len(sizes) != 5:
        return None
    groups = sizes.pop(GROUPS)
    if not (isinstance(groups, int) and isinstance(sizes[HEADS], int) and groups > 0 and sizes[HEADS] > 0):
        return None
    wanted = [*sizes[:HEADS], sizes[HEADS] * groups, *sizes[HEADS + 1 :]]
    # A size of -1, of which `reshape` takes one, is what is left over.
    same = all(given in (size, -1) for given, size in zip(merged, wanted, strict=True))  # type: ignore[arg-type]
    return sizes if same else None


def _unsqueezed(node: Any) -> fx.Node | None:
    """What `node` is after `unsqueeze(..., 2)` and slices that keep everything."""
    node = unsliced(node)
    if not isinstance(node, fx.Node) or node.target is not aten.unsqueeze.default or node.args[1] != GROUPS:
        return None
    return unsliced(node.args[0])  # type: ignore[no-any-return]


def unsliced(node: Any) -> Any:
    """What slices that keep everything are taken of."""
    while isinstance(node, fx.Node) and node.target is aten.slice.Tensor and keeps_everything(*node.args[1:]):
        node = node.args[0]
    return node


def keeps_everything(_dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> bool:
    """Whether `aten.slice` with these arguments after the tensor returns all of it."""
    return start in (None, 0) and (end is None or end == torch.iinfo(torch.int64).max) and step == 1
