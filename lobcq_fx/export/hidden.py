"""Values that nobody defines and no token reads: what masks hide.

A query that sees no key, such as a padding token's, has no attention: torch gives zeros, ONNX Runtime a mean of the
values. What is computed from that differs as well, and says nothing of an export. It is found by running the torch
graph twice, the second time with other results for such queries: what then changes is hidden, all else is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lobcq_fx.graph.stored_linear import ENCODERS

SDPA = torch.ops.aten.scaled_dot_product_attention.default

OTHER_RESULT = 1.0
"""What is added to the attention of a query that sees nothing; what it leads to stays finite."""


@dataclass(frozen=True)
class Hidden:
    """rows: of each encoded activation, by its node's name. values: of each output. Both are empty if none is."""

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    values: Sequence[Tensor] = ()


def find_hidden(graph_module: fx.GraphModule, sample: Sequence[Tensor]) -> Hidden:
    """What masks hide when the graph is called with `sample`."""
    usual, other = _Run(graph_module, 0.0), _Run(graph_module, OTHER_RESULT)
    with torch.inference_mode():
        outputs = usual.run(*[tensor.clone() for tensor in sample])
        if not usual.blind:
            return Hidden()
        others = other.run(*[tensor.clone() for tensor in sample])
    rows = {
        name: torch.stack([_changed(*pair).any(-1) for pair in zip(parts, other.encoded[name], strict=True)]).any(0)
        for name, parts in usual.encoded.items()
    }
    return Hidden(rows, [_changed(*pair) for pair in zip(outputs, others, strict=True)])


class _Run(fx.Interpreter):
    """Runs a graph, adds `shift` to the attention of queries that see nothing and keeps the encoded activations."""

    def __init__(self, graph_module: fx.GraphModule, shift: float) -> None:
        super().__init__(graph_module)
        self.shift, self.blind, self.encoded = shift, False, dict[str, Sequence[Tensor]]()

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        result = super().run_node(n)
        if n.target in ENCODERS.values():
            self.encoded[n.name] = result
        if n.target is SDPA:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            queries = _blind_queries((*args[3:4], kwargs.get("attn_mask"))[0])
            if queries is not None and queries.any():
                self.blind = True
                result = torch.where(queries, result + self.shift, result)
        return result


def _blind_queries(mask: Tensor | None) -> Tensor | None:
    """[..., T, 1]: whether a query sees none of its keys."""
    if mask is None or not mask.shape[-1]:
        return None
    if mask.dtype == torch.bool:
        return ~mask.any(-1, keepdim=True)
    return mask.amax(-1, keepdim=True) <= torch.finfo(mask.dtype).min


def _changed(one: Tensor, other: Tensor) -> Tensor:
    if one.element_size() == 1:
        return one.view(torch.uint8) != other.view(torch.uint8)
    return (one != other) & ~(one.isnan() & other.isnan())
