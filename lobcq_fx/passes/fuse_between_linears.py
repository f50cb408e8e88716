"""Pass: what a decoder spells out between its linears runs as one call each.

weight * cast(x * rsqrt(mean(x**2) + eps))            ->  rms_norm(x, weight, eps, dtype of the cast)
x * cos + cat(-x[..., half:], x[..., :half]) * sin    ->  rotate_half(x, cos, sin, half)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lobcq_fx.graph.attributes import add_call, get_attribute, has_attribute
from lobcq_fx.graph.dead_code import erase_dead_nodes
from lobcq_fx.graph.norms import FLOATS, root_mean_square
from lobcq_fx.passes.group_query_heads import keeps_everything
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.tracing.ranks import rank_of

aten = torch.ops.aten
lobcq = torch.ops.lobcq

LAST = 3
"""Dimension of the columns in [B, H, T, D]."""


@dataclass(frozen=True)
class FuseBetweenLinears(GraphPass):
    """For devices with kernels for these ops, where a step's time is that of many small calls.

    By structure alone: the graphs of a saved model have no metadata. Bits stay as they are.
    """

    name: ClassVar[str] = "fuse_between_linears"

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every norm and every rotation; what nothing reads then goes."""
        graph, modified = graph_module.graph, False
        for node in list(graph.nodes):
            found = _rms_norm(graph_module, node) or _rotate_half(graph_module, node)
            if found is None:
                continue
            target, arguments = found
            with graph.inserting_before(node):
                fused = add_call(graph, target, arguments, like=node)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            modified = True
        if modified:
            erase_dead_nodes(graph)
        return modified


Found = tuple[Any, tuple[Any, ...]]
"""An op and its arguments."""


def _rms_norm(graph_module: fx.GraphModule, node: fx.Node) -> Found | None:
    for weight, rest in _factors(node):
        if not _is_vector(graph_module, weight):
            continue
        product, normalized = _uncast(rest)
        for wide, inverse in _factors(product):
            x, dtype = _uncast(wide)
            eps = _eps(inverse, wide)
            if eps is not None and dtype == torch.float32:
                return lobcq.rms_norm.default, (x, weight, eps, normalized or torch.float32)
    return None


def _eps(inverse: fx.Node, wide: fx.Node) -> float | None:
    """eps where a node is `rsqrt(mean(wide**2) + eps)` over the last dimension."""
    found = root_mean_square(inverse, wide)
    if found is None:
        return None
    total, mean, _ = found
    eps = total.args[1]
    plain = not total.kwargs and not mean.kwargs and mean.args[1:] == ([-1], True)
    return eps if plain and isinstance(eps, float) else None


def _is_vector(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a parameter [K] of floats, K > 1, or one to which a number is added, as Gemma does it."""
    while node.target in (aten.add.Tensor, aten.to.dtype) and isinstance(node.args[0], fx.Node):
        if isinstance(node.args[1], fx.Node) or node.kwargs:
            return False
        node = node.args[0]
    if node.op != "get_attr" or not has_attribute(graph_module, str(node.target)):
        return False
    value = get_attribute(graph_module, str(node.target))
    return isinstance(value, Tensor) and value.dim() == 1 and value.numel() > 1 and value.dtype in FLOATS


def _rotate_half(graph_module: fx.GraphModule, node: fx.Node) -> Found | None:
    if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(one, fx.Node) for one in node.args):
        return None
    for straight, turned in (node.args, node.args[::-1]):
        for cat, sin in _factors(turned):
            found = _turned(cat)
            if found is None:
                continue
            x, half = found
            for one, cos in _factors(straight):
                if one is x and all(rank_of(graph_module, factor) == LAST + 1 for factor in (cos, sin)):
                    return lobcq.rotate_half.default, (x, cos, sin, half)
    return None


def _turned(cat: fx.Node) -> tuple[fx.Node, int] | None:
    """x and half where a node is `cat(-x[..., half:], x[..., :half])` of x [B, H, T, D]."""
    if cat.target is not aten.cat.default or list(cat.args[1:]) not in ([-1], [LAST]):
        return None
    parts: Any = cat.args[0]
    if len(parts) != 2:
        return None
    behind, before = _argument(parts[0], aten.neg.default), parts[1]
    x = _argument(behind, aten.slice.Tensor)
    if x is None or behind is None or _argument(before, aten.slice.Tensor) is not x:
        return None
    (dim, half, end, *step), (other, start, until, *rest) = behind.args[1:], before.args[1:]
    columns = (LAST, -1)
    sliced = dim in columns and other in columns and not any(one != 1 for one in (*step, *rest))
    whole = keeps_everything(dim, 0, end) and start in (None, 0) and half == until
    return (x, half) if sliced and whole and isinstance(half, int) and half > 0 else None


def _factors(node: Any) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of the factors of a product of two tensors."""
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor:
        return []
    one, other = node.args
    return [(one, other), (other, one)] if isinstance(one, fx.Node) and isinstance(other, fx.Node) else []


def _uncast(node: fx.Node) -> tuple[fx.Node, torch.dtype | None]:
    """What a node casts, and to which dtype; a node that is no cast as it is."""
    cast = node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs
    return (node.args[0], node.args[1]) if cast else (node, None)  # type: ignore[return-value]


def _argument(node: Any, target: Any) -> fx.Node | None:
    """The first argument of a call of `target`; None where a node is none."""
    if not isinstance(node, fx.Node) or node.target is not target:
        return None
    first = node.args[0]
    return first if isinstance(first, fx.Node) else None
