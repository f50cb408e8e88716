"""Fake tensors, which have sizes, dtypes and devices without values, as torch's own capture uses them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode that made the graph's metadata, or None where there is none: of inputs, where it has any."""
    for node in graph.find_nodes(op="placeholder", sort=False) or graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def uncached_fake_tensors() -> AbstractContextManager[None]:
    """Capture in here without torch's cache of fake results.

    Sizes are symbolic: to find a result again, or to keep one, takes longer than to compute it.
    """
    context: AbstractContextManager[None] = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    return context
