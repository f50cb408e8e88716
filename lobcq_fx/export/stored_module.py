"""The graph on stored weights as a module of its own, ready for torch.export."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from lobcq_fx.errors import ExportError
from lobcq_fx.export.float32 import compute_in_float32
from lobcq_fx.graph.attributes import register_attribute
from lobcq_fx.model import QuantizedModel
from lobcq_fx.storage.checkpoint import stored_tensors

aten = torch.ops.aten

KEPT = "logits_to_keep"
"""An input of traced language models that exported ones do not have."""


def stored_module(q: QuantizedModel, *, last_logits_only: bool = False) -> fx.GraphModule:
    """A copy of q's stored graph that computes in fp32 whatever is not quantized; the model is not touched.

    Args:
        q: the model.
        last_logits_only: a language model returns the logits of the last position, not of all.

    Raises:
        ExportError: the graph cannot be told which positions' logits to return.
    """
    root = nn.Module()
    for name, tensor in stored_tensors(q.graph_module, [q.stored_graph]).items():
        register_attribute(root, name, tensor)
    graph = fx.Graph()
    graph.output(graph.graph_copy(q.stored_graph, {}))
    _fix_kept_positions(graph, last_only=last_logits_only)
    graph_module = fx.GraphModule(root, graph, class_name="LobcqGraph").eval()
    compute_in_float32(graph_module)
    return graph_module


def _fix_kept_positions(graph: fx.Graph, *, last_only: bool) -> None:
    inputs = [node for node in graph.find_nodes(op="placeholder") if node.target == KEPT]
    if last_only and not inputs:
        raise ExportError(f"last_logits_only asks for a language model that takes {KEPT}: leave it out")
    for kept in inputs:
        for user in list(kept.users):
            if user.target is not aten.index.Tensor or user.args[1] != [None, kept]:
                raise ExportError(f"the graph reads {KEPT} in {user.format_node()}, which an exported graph cannot")
            hidden = user.args[0]
            if last_only:
                with graph.inserting_before(user):
                    hidden = graph.call_function(aten.slice.Tensor, (hidden, 1, -1, torch.iinfo(torch.int64).max))
            user.replace_all_uses_with(hidden)
            graph.erase_node(user)
        graph.erase_node(kept)


class FlatModule(nn.Module):
    """Calls a graph with its inputs as one list, which torch.export can describe whatever they are called."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.traced = graph

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """The graph's outputs."""
        outputs: tuple[Tensor, ...] = tuple(self.traced(*tensors))
        return outputs


PREFIX = "traced."
"""What stands before the graph's names in a FlatModule's."""
