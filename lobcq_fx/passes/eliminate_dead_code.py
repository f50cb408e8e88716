"""Pass: remove nodes without users, and the parameters, buffers and submodules that no node refers to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lobcq_fx.graph.attributes import delete_attribute, named_arguments
from lobcq_fx.passes.infra import GraphPass


@dataclass(frozen=True)
class EliminateDeadCode(GraphPass):
    """Dead nodes go, then what only they referred to. Placeholders stay: they are the graph's signature.

    Args:
        others: graphs on the same tensors, which keep what they refer to.
    """

    name: ClassVar[str] = "eliminate_dead_code"

    others: tuple[fx.Graph, ...] = ()

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Erase from the last node to the first, so that chains go in one run."""
        modified = bool(graph_module.graph.eliminate_dead_code(_has_effects))
        graphs = (graph_module.graph, *self.others)
        used = {str(n.target) for graph in graphs for n in graph.nodes if n.op in ("get_attr", "call_module")}
        tensors = [name for name, _ in graph_module.named_parameters(remove_duplicate=False)]
        tensors += [name for name, _ in graph_module.named_buffers(remove_duplicate=False)]
        for name in tensors:
            if name not in used and not any(name.startswith(f"{module}.") for module in used):
                delete_attribute(graph_module, name)
                modified = True
        return self._drop_empty_modules(graph_module, used) or modified

    def _drop_empty_modules(self, graph_module: fx.GraphModule, used: set[str]) -> bool:
        modified = False
        for name, module in reversed(list(graph_module.named_modules())):
            needed = not name or name in used or any(module.children())
            holds = any(True for _ in module.parameters(recurse=False)) or any(
                True for _ in module.buffers(recurse=False)
            )
            if not needed and not holds:
                delete_attribute(graph_module, name)
                modified = True
        return modified


def _has_effects(node: fx.Node) -> bool:
    """torch takes every attention for a random one, which advances the generator; without dropout it is not."""
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return bool(named_arguments(node).get("dropout_p"))
    return bool(node.is_impure())
