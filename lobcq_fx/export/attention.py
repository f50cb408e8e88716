"""Pass: attention over a growing cache as one node of ONNX Runtime's GroupQueryAttention.

cat(past, new) for keys and values, then scaled_dot_product_attention  ->  com.microsoft::GroupQueryAttention, which
appends to the cache itself and reads each key and value head where it lies. ONNX Runtime has it on the CPU with a mask
of the model's own since 1.22.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.graph.attributes import named_arguments
from lobcq_fx.graph.dead_code import erase_dead_nodes
from lobcq_fx.graph.matmuls import module_path
from lobcq_fx.passes.group_query_heads import keeps_everything
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.refusal import Refusal

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default

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


@dataclass(frozen=True)
class UseGroupQueryAttention(GraphPass):
    """Rewrite every attention of a language model's graph that the operator can express, after `GroupQueryHeads`.

    It refuses those that stay as they are.

    Args:
        calling: of the model, whose caches come last among the graph's inputs.
    """

    name: ClassVar[str] = "use_group_query_attention"

    calling: CausalLMCall

    def attempt(self, graph_module: fx.GraphModule) -> tuple[bool, list[Refusal]]:
        """Replace each, and the grown cache with it wherever that is read."""
        graph, modified, refusals = graph_module.graph, False, list[Refusal]()
        widths = [width for _, *both in self.calling.cache_heads for width in both]
        states = [node for node in graph.nodes if node.op == "placeholder"][-len(widths) :]
        caches = dict(zip(states, widths, strict=True))
        for node in graph.find_nodes(op="call_function", target=ATTENTION):
            match = _match(node, caches)
            if isinstance(match, str):
                refusals.append(Refusal(self.name, module_path(node) or node.name, match))
                continue
            _replace(node, match)
            modified = True
        if modified:
            erase_dead_nodes(graph)
        return modified, refusals


def _replace(node: fx.Node, match: _Match) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        result = graph.call_function(group_query_attention, (match.query, *match.states, match.mask, match.scale))
        parts = [graph.call_function(operator.getitem, (result, index)) for index in range(3)]
    for old, new in zip((node, match.keys, match.values), parts, strict=True):
        old.replace_all_uses_with(new, delete_user_cb=partial(_comes_after, new))
    graph.erase_node(node)


def group_query_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A node of the operator: the attention [B, H, T, D], and the grown keys and values [B, G, P + T, D]."""
    batch, heads, length, width = query.shape
    groups, total = key.shape[1], past_key.shape[2] + length
    if not mask.is_floating_point():
        zero = query.new_zeros(())
        mask = torch.where(mask, zero, query.new_full((), torch.finfo(query.dtype).min))
    # Numbers of heads that a reshape has left to be computed (-1) are the same in every call.
    attributes: dict[str, Any] = {"num_heads": int(heads), "kv_num_heads": int(groups)}
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
            torch.full((batch,), total - 1, dtype=torch.int32, device=query.device),
            torch.full((), total, dtype=torch.int32, device=query.device),
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


def _match(node: fx.Node, caches: Mapping[fx.Node, int]) -> _Match | str:
    """The parts of an attention over a growing cache, or why it is none. `caches` has their heads' widths."""
    arguments = named_arguments(node)
    query, mask = arguments["query"], arguments.get("attn_mask")
    if mask is None or arguments.get("is_causal") or arguments.get("dropout_p"):
        return "it has no mask of its own"
    keys, values = _appended(arguments["key"], caches), _appended(arguments["value"], caches)
    if keys is None or values is None:
        return "keys or values are not a cache with new ones appended"
    match = _Match(query, keys, values, mask, arguments.get("scale"))
    width, other = (caches[past] for past in match.states[2:])
    if width != other or width % WIDTH_MULTIPLE:
        return f"its heads are {width} and {other} wide, not a multiple of {WIDTH_MULTIPLE} for keys and values alike"
    return match


def _appended(node: Any, caches: Mapping[fx.Node, int]) -> fx.Node | None:
    """The `cat` of a cache and new states along the sequence that `node` is, sliced and expanded to itself."""
    while isinstance(node, fx.Node) and (
        node.target is aten.expand.default or (node.target is aten.slice.Tensor and keeps_everything(*node.args[1:]))
    ):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default:
        return None
    states: Any = node.args[0]
    along_sequence = len(node.args) > 1 and node.args[1] in (-2, 2)
    return node if along_sequence and len(states) == 2 and states[0] in caches else None


def _comes_after(node: fx.Node, user: fx.Node) -> bool:
    """Not what leads to the new node: the attention that it replaces, and views of the cache for that."""
    return node < user
