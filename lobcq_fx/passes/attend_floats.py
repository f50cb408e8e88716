"""Pass: attention over float keys and values runs in the device's own kernel where there is one query.

sdpa(q, k, v, mask, scale, enable_gqa)  ->  attention.float_states(q, k, v, mask, scale, enable_gqa)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lobcq_fx.graph.attributes import add_call, named_arguments
from lobcq_fx.passes.group_query_heads import unsliced
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.tracing.ranks import rank_of

aten = torch.ops.aten
lobcq = torch.ops.lobcq


@dataclass(frozen=True)
class AttendFloats(GraphPass):
    """For devices with such a kernel, after `GroupQueryHeads`. Attention that makes a causal mask of its own stays."""

    name: ClassVar[str] = "attend_floats"

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every attention of four dimensions."""
        graph, modified = graph_module.graph, False
        for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            given = named_arguments(node)
            mask = given.get("attn_mask")
            if given.get("is_causal") or given.get("dropout_p"):
                continue
            if rank_of(graph_module, given["key"]) != 4 or (mask is not None and rank_of(graph_module, mask) != 4):
                continue
            states = (given["query"], unsliced(given["key"]), unsliced(given["value"]))
            with graph.inserting_before(node):
                arguments = (*states, mask, given.get("scale"), bool(given.get("enable_gqa", False)))
                attended = add_call(graph, lobcq.attention.float_states, arguments, like=node)
            node.replace_all_uses_with(attended)
            graph.erase_node(node)
            modified = True
        return modified
