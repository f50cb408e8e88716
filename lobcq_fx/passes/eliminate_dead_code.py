"""Pass: remove nodes without users, and the parameters, buffers and submodules that no node refers to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from lobcq_fx.graph.attributes import delete_attribute
from lobcq_fx.graph.dead_code import erase_dead_nodes
from lobcq_fx.passes.infra import GraphPass


@dataclass(frozen=True)
class EliminateDeadCode(GraphPass):
    """Dead nodes go, then what only they referred to. Placeholders stay: they are the graph's signature.

    Args:
        others: graphs on the same tensors; theirs go too, and what they refer to stays.
    """

    name: ClassVar[str] = "eliminate_dead_code"

    others: tuple[fx.GraphModule, ...] = ()

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Nodes first: what they alone referred to goes in the same run."""
        modified = erase_dead_nodes(graph_module.graph)
        for other in self.others:
            if erase_dead_nodes(other.graph):
                other.recompile()
                modified = True
        graphs = [one.graph for one in (graph_module, *self.others)]
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
