"""How many dimensions a node's value has, where its metadata or the operators before it say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lobcq_fx.graph.attributes import get_attribute, has_attribute
from lobcq_fx.tracing.example import InputExample

aten = torch.ops.aten

_SIZES = (aten.expand.default, aten.view.default, aten.reshape.default)
_AS_THE_FIRST = (
    aten.slice.Tensor, aten.transpose.int, aten.narrow.default, aten.contiguous.default, aten.index_copy_.default,
    aten.to.dtype, aten.to.device, aten.cos.default, aten.sin.default, torch.ops.lobcq.rotate_half.default,
)  # fmt: skip
_BROADCAST = (aten.add.Tensor, aten.mul.Tensor)


def rank_of(graph_module: fx.GraphModule, node: Any) -> int | None:
    """None where nothing says."""
    if not isinstance(node, fx.Node):
        return None
    value = node.meta.get("val")
    if node.op == "get_attr" and has_attribute(graph_module, str(node.target)):
        value = get_attribute(graph_module, str(node.target))
    if isinstance(value, Tensor):
        return value.dim()
    if node.op == "placeholder":
        example = InputExample.of(node)
        return None if example is None else len(example.shape)
    if node.target in _SIZES:
        return len(node.args[1])  # type: ignore[arg-type]
    if node.target in _AS_THE_FIRST:
        return rank_of(graph_module, node.args[0])
    if node.target is aten.cat.default:
        return rank_of(graph_module, node.args[0][-1])  # type: ignore[index]
    if node.target is aten.unsqueeze.default:
        rank = rank_of(graph_module, node.args[0])
        return None if rank is None else rank + 1
    if node.target in _BROADCAST:
        ranks = [rank_of(graph_module, one) for one in node.args if isinstance(one, fx.Node)]
        return None if None in ranks else max(rank for rank in ranks if rank is not None)
    return None
