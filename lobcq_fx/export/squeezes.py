"""Pass: a squeeze names the dimensions that it takes away. torch leaves others than 1 alone, ONNX refuses them.

squeeze(x, 1) of x [B, T, D]  ->  x
squeeze(x, [0, 1]) of x [1, T, D]  ->  squeeze(x, [0])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from lobcq_fx.graph.attributes import add_call
from lobcq_fx.passes.infra import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class SqueezeOnesOnly(GraphPass):
    """Leave out of every squeeze what is not 1 in the traced graph; one of nothing else goes."""

    name: ClassVar[str] = "squeeze_ones_only"

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite what names others; a graph without metadata stays as it is."""
        graph, modified = graph_module.graph, False
        for node in list(graph.nodes):
            dims = _superfluous(node)
            if dims is None:
                continue
            x: Any = node.args[0]
            if dims:
                with graph.inserting_before(node):
                    x = add_call(graph, aten.squeeze.dims, (x, dims), like=node)
            node.replace_all_uses_with(x)
            graph.erase_node(node)
            modified = True
        return modified


def _superfluous(node: fx.Node) -> list[int] | None:
    """The dimensions that go where the node names others too, else None."""
    if node.target not in (aten.squeeze.dim, aten.squeeze.dims):
        return None
    x, named = cast(tuple[Any, Any], node.args)
    before, after = (one.meta.get("val") if isinstance(one, fx.Node) else None for one in (x, node))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or not before.dim():
        return None
    every = {int(dim) % before.dim() for dim in (named if isinstance(named, (list, tuple)) else [named])}
    ones = sorted(dim for dim in every if isinstance(before.shape[dim], int) and before.shape[dim] == 1)
    return ones if len(ones) < len(every) and before.dim() - len(ones) == after.dim() else None
