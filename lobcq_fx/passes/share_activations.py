"""Pass: let matmuls that read the same activation read one encoded activation.

quantize_activation(x, ...)  three times, for q, k and v   ->   once; quantize_activation_int8 likewise
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from lobcq_fx.graph.aliasing import Writes
from lobcq_fx.graph.attributes import get_attribute, named_arguments
from lobcq_fx.graph.stored_linear import ENCODERS
from lobcq_fx.passes.infra import GraphPass


@dataclass(frozen=True)
class ShareActivations(GraphPass):
    """Merge nodes that encode the same activation with the same codebooks, array size and static scale.

    Activations between whose readers something writes to their memory are different ones.
    """

    name: ClassVar[str] = "share_activations"

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Redirect users to the first of equal nodes. Static scales are equal if their values are."""
        first: dict[tuple[Any, ...], fx.Node] = {}
        writes = Writes()
        modified = False
        for node in list(graph_module.graph.nodes):
            writes.visit(node)
            if node.op != "call_function" or node.target not in ENCODERS.values():
                continue
            arguments = named_arguments(node)
            x, scale = arguments.pop("x"), arguments.pop("static_scale", None)
            key = (node.target, x, writes.before(x), *arguments.values(), _value(graph_module, scale))
            if key not in first:
                first[key] = node
                continue
            self._redirect(graph_module.graph, node, first[key])
            modified = True
        return modified

    def _redirect(self, graph: fx.Graph, duplicate: fx.Node, kept: fx.Node) -> None:
        parts = {user.args[1]: user for user in kept.users}
        for user in list(duplicate.users):
            user.replace_all_uses_with(parts[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(duplicate)


def _value(graph_module: fx.GraphModule, scale: fx.Node | None) -> float | None:
    if scale is None:
        return None
    value = get_attribute(graph_module, str(scale.target))
    assert isinstance(value, Tensor)
    return float(value)
