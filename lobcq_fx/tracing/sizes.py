"""Sizes in a traced graph: which are fixed, and what tracing assumed of the others."""

from __future__ import annotations

import torch


def fixed_size(size: int | torch.SymInt) -> int | None:
    """A size that tracing fixed, also where it started out dynamic; None for one that is still free."""
    if isinstance(size, int):
        return size
    value: int | None = size.node.maybe_as_int()
    return value
