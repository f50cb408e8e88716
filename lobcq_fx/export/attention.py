"""Attention over a growing cache as one node of ONNX Runtime's GroupQueryAttention.

cat(past, new) for keys and values, then scaled_dot_product_attention  ->  com.microsoft::GroupQueryAttention, which
appends to the cache itself and reads each key and value head where it lies. ONNX Runtime has it on the CPU with a mask
of the model's own since 1.22.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lobcq_fx.passes.attributes import named_arguments
from lobcq_fx.passes.group_query_heads import GroupQueryHeads, keeps_everything

aten = torch.ops.aten

OPERATOR = "com.microsoft::GroupQueryAttention"
WIDTH_MULTIPLE = 8
"""What the width of a head has to be a multiple of."""


@dataclass(frozen=True)
class _Match:
    """query [B, H, T, D]; new and cached keys and values [B, G, T or P, D]; mask [B or 1, H or 1, T, P + T]."""

    query: fx.Node
    keys: fx.Node
    values: fx.Node
    mask: fx.Node
    scale: float | None

    @property
    def states(self) -> tuple[Any, ...]:
        """New key, new value, cached key, cached value."""
        keys: Any = self.keys.args[0]
        values: Any = self.values.args[0]
        return keys[1], values[1], keys[0], values[0]


def use_group_query_attention(graph_module: fx.GraphModule) -> tuple[int, tuple[str, ...]]:
    """Rewrite every attention of the graph that the operator can express.

    Returns:
        How many there were, and for each that stays as it is the reason.
    """
    GroupQueryHeads()(graph_module)
    graph, fused, refused = graph_module.graph, 0, []
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        match = _match(node)
        if isinstance(match, str):
            refused.append(match)
            continue
        with graph.inserting_before(node):
            result = graph.call_function(group_query_attention, (match.query, *match.states, match.mask, match.scale))
            parts = [graph.call_function(operator.getitem, (result, index)) for index in range(3)]
        for old, new in zip((node, match.keys, match.values), parts, strict=True):
            old.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: _comes_after(user, new))
        fused += 1
    graph.eliminate_dead_code()
    graph_module.recompile()
    return fused, tuple(refused)


def group_query_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A node of the operator: the attention [B, H, T, D], and the grown keys and values [B, G, P + T, D]."""
    batch, heads, length, width = query.shape
    groups, total = key.shape[1], past_key.shape[2] + length
    if not mask.is_floating_point():
        zero = torch.zeros((), dtype=query.dtype)
        mask = torch.where(mask, zero, torch.full((), torch.finfo(query.dtype).min, dtype=query.dtype))
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": groups}
    if scale is not None:
        attributes["scale"] = scale
    grown = [batch, groups, total, width]
    output, keys, values = torch.onnx.ops.symbolic_multi_out(
        OPERATOR,
        [
            _heads_last(query),
            _heads_last(key),
            _heads_last(value),
            past_key,
            past_value,
            # Where each sequence's last key lies, and how many there are: padding is the mask's business.
            torch.full((batch,), total - 1, dtype=torch.int32),
            torch.full((), total, dtype=torch.int32),
            None,  # the rotary embedding stays outside
            None,
            None,
            mask,
        ],
        attributes,
        dtypes=[query.dtype] * 3,
        shapes=[[batch, length, heads * width], grown, grown],
        version=1,
    )
    return output.view(batch, length, heads, width).transpose(1, 2), keys, values


def _heads_last(states: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H * D]."""
    batch, heads, length, width = states.shape
    return states.transpose(1, 2).reshape(batch, length, heads * width)


def _match(node: fx.Node) -> _Match | str:
    """The parts of an attention over a growing cache, or why it is none."""
    arguments = named_arguments(node)
    query, mask = arguments["query"], arguments.get("attn_mask")
    if mask is None or arguments.get("is_causal") or arguments.get("dropout_p"):
        return "it has no mask of its own"
    keys, values = _appended(arguments["key"]), _appended(arguments["value"])
    if keys is None or values is None:
        return "keys or values are not a cache with new ones appended"
    sizes = [states.meta["val"].shape for states in (query, keys, values)]
    heads, width = sizes[0][1], sizes[0][3]
    if not isinstance(width, int) or width % WIDTH_MULTIPLE or any(size[3] != width for size in sizes):
        return f"its heads are {width} wide, and not a multiple of {WIDTH_MULTIPLE} in query, key and value alike"
    groups = sizes[1][1]
    if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups or sizes[2][1] != groups:
        return "its numbers of heads are not fixed multiples"
    return _Match(query, keys, values, mask, arguments.get("scale"))


def _appended(node: Any) -> fx.Node | None:
    """The `cat` of a graph input and new states along the sequence that `node` is, sliced and expanded to itself."""
    while isinstance(node, fx.Node) and (
        node.target is aten.expand.default or (node.target is aten.slice.Tensor and keeps_everything(*node.args[1:]))
    ):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default:
        return None
    states, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    is_cache = len(states) == 2 and states[0].op == "placeholder"  # type: ignore[arg-type, union-attr, index]
    return node if is_cache and dim in (-2, 2) else None


def _comes_after(user: fx.Node, node: fx.Node) -> bool:
    """Not what leads to the new node: the attention that it replaces, and views of the cache for that."""
    return node < user
