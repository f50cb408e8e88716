"""Which nodes a graph could do without: those that nothing reads and that change nothing."""

from __future__ import annotations

import torch
from torch import fx

from lobcq_fx.graph.aliasing import written_arguments
from lobcq_fx.graph.attributes import named_arguments


def erase_dead_nodes(graph: fx.Graph) -> bool:
    """Erase them, from the last node to the first, so that chains go in one run; whether there were any."""
    return bool(graph.eliminate_dead_code(has_effects))


def has_effects(node: fx.Node) -> bool:
    """As FX sees it, but for two things that operators do not declare.

    Some write to their arguments: batch norms in training. And every attention passes for a random one, which advances
    the generator; without dropout it is none.
    """
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return bool(named_arguments(node).get("dropout_p"))
    return bool(node.is_impure()) or bool(written_arguments(node))
