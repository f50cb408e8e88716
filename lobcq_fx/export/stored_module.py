"""The graph on stored weights as a module of its own, ready for torch.export."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from lobcq_fx.errors import ExportError
from lobcq_fx.export.float32 import compute_in_float32
from lobcq_fx.model import QuantizedModel
from lobcq_fx.passes.attributes import register_attribute
from lobcq_fx.storage.checkpoint import stored_tensors

KEPT = "logits_to_keep"
"""An input of traced language models that exported ones do not have: they return the logits of every position."""


def stored_module(q: QuantizedModel) -> fx.GraphModule:
    """A copy of q's stored graph that computes in fp32 whatever is not quantized; the model is not touched.

    Raises:
        ExportError: the graph reads logits_to_keep for something else than to select positions.
    """
    root = nn.Module()
    for name, tensor in stored_tensors(q.graph_module, q.stored_graph).items():
        register_attribute(root, name, tensor)
    graph = fx.Graph()
    graph.output(graph.graph_copy(q.stored_graph, {}))
    _keep_every_position(graph)
    graph_module = fx.GraphModule(root, graph, class_name="LobcqGraph").eval()
    compute_in_float32(graph_module)
    return graph_module


def _keep_every_position(graph: fx.Graph) -> None:
    for kept in graph.find_nodes(op="placeholder"):
        if kept.target != KEPT:
            continue
        for user in list(kept.users):
            if user.target is not torch.ops.aten.index.Tensor or user.args[1] != [None, kept]:
                raise ExportError(f"the graph reads {KEPT} in {user.format_node()}, which an exported graph cannot")
            user.replace_all_uses_with(user.args[0])
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
