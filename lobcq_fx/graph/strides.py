"""Results that lie otherwise in memory than a rewritten node's did: what a view further on needs is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lobcq_fx.graph.attributes import add_call
from lobcq_fx.graph.fake_tensors import fake_mode

aten = torch.ops.aten


def keep_views(graph: fx.Graph, results: Iterable[fx.Node]) -> None:
    """Make those results contiguous whose own strides would make a view fail; for the others, set metadata right.

    Elementwise operators hand strides on, so that a view may be far from what it depends on. What has no need of it
    is left as it lies: nothing is copied there.

    Args:
        graph: with metadata, in which nodes after the results have that of what the results replaced.
        results: nodes that give the values of the nodes that they replaced, in other strides or in the same.
    """
    waiting = set(results)
    while True:
        values, failed = _propagated(graph, waiting)
        if not failed:
            break
        for node in failed:
            with graph.inserting_after(node):
                copy = add_call(graph, aten.contiguous.default, (node,), like=node)
            for user in list(node.users):
                if user is not copy:
                    user.replace_input_with(node, copy)
        waiting -= failed
    for node, value in values.items():
        node.meta["val"] = value


def _propagated(graph: fx.Graph, results: set[fx.Node]) -> tuple[dict[fx.Node, Any], set[fx.Node]]:
    """Values of the nodes whose strides the results change; and the results without which each view would succeed."""
    mode = fake_mode(graph)
    assert mode is not None
    values: dict[fx.Node, Any] = {}
    origins: dict[fx.Node, set[fx.Node]] = {node: {node} for node in results}
    failed: set[fx.Node] = set()
    for node in graph.nodes:
        changed = [one for one in node.all_input_nodes if one in origins]
        if node in results or node.op != "call_function" or not changed or _is_new(node):
            continue
        causes = set().union(*(origins[one] for one in changed))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: values.get(one, one.meta["val"]))
        try:
            with mode:
                value = node.target(*args, **kwargs)
        except (RuntimeError, ValueError):
            failed |= causes
            continue
        if _strides(value) != _strides(node.meta["val"]):
            values[node], origins[node] = value, causes
    return values, failed


def _is_new(node: fx.Node) -> bool:
    """Whether it gives memory of its own, in sizes that depend on values: a second run would have other symbols."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


def _strides(value: Any) -> list[Mapping[str, Any] | tuple[Any, ...] | None]:
    return [one.stride() if isinstance(one, Tensor) else None for one in pytree.tree_leaves(value)]
