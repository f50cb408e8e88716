"""Pass: attention reads cached keys and values as they are encoded, and never holds them decoded.

sdpa(q, matmul(dequantize_states(keys), R), dequantize_states(values))  ->  attention(matmul(q, R), keys, values)

R is the symmetric rotation of keys, if they have one: queries that are rotated give the same scores with keys that
stay rotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lobcq_fx.graph.attributes import add_call, named_arguments
from lobcq_fx.graph.dead_code import erase_dead_nodes
from lobcq_fx.ops.attention import WIDEST_HEAD
from lobcq_fx.passes.group_query_heads import keeps_everything
from lobcq_fx.passes.guard_attention import is_guarded
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.passes.quantize_cache import CONSTANT
from lobcq_fx.refusal import Refusal

aten = torch.ops.aten
lobcq = torch.ops.lobcq

ATTENTION = (aten.scaled_dot_product_attention.default, lobcq.attention.float_states)
"""As a model was traced, and as it is lowered."""


@dataclass(frozen=True)
class FuseCachedAttention(GraphPass):
    """For devices with a kernel for `lobcq::attention`, after `QuantizeCache`, `GroupQueryHeads` and `AttendFloats`.

    Attention that is written out, or reads what is not cached, stays as it is.

    in_int8: multiply integers instead of decoded keys and values.
    """

    name: ClassVar[str] = "fuse_cached_attention"

    in_int8: bool = False

    def attempt(self, graph_module: fx.GraphModule) -> tuple[bool, list[Refusal]]:
        """Fuse every attention of the graph; what only decoded for one of them goes."""
        graph, modified, refusals = graph_module.graph, False, []
        for node in [one for target in ATTENTION for one in graph.find_nodes(op="call_function", target=target)]:
            given = named_arguments(node)
            given.setdefault("attn_mask", given.pop("mask", None))
            value, key = _cached(given["value"]), _cached(_unguarded(given["key"], given["value"]))
            if key is None or value is None or value.rotation is not None:
                refusals.append(Refusal(self.name, node.name, "it reads other keys or values than cached ones"))
                continue
            if reason := _refusal(given, key, value):
                refusals.append(Refusal(self.name, node.name, reason))
                continue
            query: Any = given["query"]
            with graph.inserting_before(node):
                if key.rotation is not None:
                    query = add_call(graph, aten.matmul.default, (query, key.rotation), like=node)
                arguments = (*_arguments(query, key.states, value.states, given), self.in_int8)
                fused = add_call(graph, lobcq.attention.default, arguments, like=node)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            modified = True
        if modified:
            erase_dead_nodes(graph)
        return modified, refusals


@dataclass(frozen=True)
class _Cached:
    """What decodes keys or values, and the matrix that undoes their rotation."""

    states: fx.Node
    rotation: fx.Node | None = None


def _cached(node: Any) -> _Cached | None:
    """Where keys or values come from, through views that change nothing; None where it is no cache."""
    while isinstance(node, fx.Node):
        if node.target is lobcq.dequantize_states.default:
            return _Cached(node)
        if node.target is aten.matmul.default:
            rotated = _cached(node.args[0])
            matrix = node.args[1]
            ours = isinstance(matrix, fx.Node) and matrix.op == "placeholder" and matrix.name.startswith(CONSTANT)
            return _Cached(rotated.states, matrix) if rotated and ours else None  # type: ignore[arg-type]
        whole = node.target is aten.slice.Tensor and keeps_everything(*node.args[1:])
        if not whole and node.target is not aten.expand.default:  # which can repeat one head alone, as the op does
            return None
        node = node.args[0]
    return None


def _unguarded(key: fx.Node, value: fx.Node) -> Any:
    """The op refuses keys and values of different lengths, which a guard hides."""
    return key.args[0] if is_guarded(key, value) else key


def _refusal(given: dict[str, Any], key: _Cached, value: _Cached) -> str | None:
    if named_arguments(key.states)["heads"] != named_arguments(value.states)["heads"]:
        return "it has other heads for keys than for values"
    if max(named_arguments(one.states)["width"] for one in (key, value)) > WIDEST_HEAD:
        return f"its heads are wider than {WIDEST_HEAD}, up to which kernels attend"
    if given.get("is_causal") or given.get("dropout_p"):
        return "it makes a causal mask of its own, or drops out"
    return None


def _arguments(query: fx.Node, keys: fx.Node, values: fx.Node, given: dict[str, Any]) -> tuple[Any, ...]:
    key, value = named_arguments(keys), named_arguments(values)
    scale = given.get("scale")
    return (
        query, key["rows"], value["rows"], key["codebooks"], given.get("attn_mask"), key["heads"], value["width"],
        key["array_size"], value["array_size"], key["width"] ** -0.5 if scale is None else scale,
    )  # fmt: skip
