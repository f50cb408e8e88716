"""Pass: a language model's graph without the input that chooses the positions whose logits are computed.

lm_head(index(hidden, [None, logits_to_keep]))  ->  lm_head(hidden), or lm_head(hidden[:, -1:])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lobcq_fx.errors import ExportError
from lobcq_fx.graph.attributes import add_call
from lobcq_fx.passes.infra import GraphPass

aten = torch.ops.aten

KEPT = "logits_to_keep"
"""An input of traced language models that exported ones do not have."""


@dataclass(frozen=True)
class FixKeptPositions(GraphPass):
    """Compute the logits of every position, or with `last_only` of the last one."""

    name: ClassVar[str] = "fix_kept_positions"

    last_only: bool = False

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Replace what the input chooses and erase it.

        Raises:
            ExportError: the graph reads the input in another way.
        """
        graph, inputs = graph_module.graph, placeholders(graph_module.graph)
        for kept in inputs:
            for user in list(kept.users):
                hidden = _indexed(user, kept)
                if self.last_only:
                    with graph.inserting_before(user):
                        last = (hidden, 1, -1, torch.iinfo(torch.int64).max)
                        hidden = add_call(graph, aten.slice.Tensor, last, like=user)
                user.replace_all_uses_with(hidden)
                graph.erase_node(user)
            graph.erase_node(kept)
        return bool(inputs)


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The input, if the graph has it."""
    return [node for node in graph.find_nodes(op="placeholder") if node.target == KEPT]


def _indexed(user: fx.Node, kept: fx.Node) -> fx.Node:
    hidden = user.args[0] if user.args else None
    if user.target is not aten.index.Tensor or user.args[1] != [None, kept] or not isinstance(hidden, fx.Node):
        raise ExportError(f"the graph reads {KEPT} in {user.format_node()}, which an exported graph cannot")
    return hidden
