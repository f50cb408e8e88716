"""Sizes in a traced graph: which are fixed, and what tracing assumed of the others."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.fx.experimental import _config


def size_oblivious() -> AbstractContextManager[Any]:
    """A context for traces that take no size for one that is neither 0 nor 1, unless the model asks.

    Operators then trace the way that is right for all sizes; without it every dynamic size is taken to be at least 2.
    """
    patched: AbstractContextManager[Any] = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patched


def fixed_size(size: int | torch.SymInt) -> int | None:
    """A size that tracing fixed, also where it started out dynamic; None for one that is still free."""
    if isinstance(size, int):
        return size
    value: int | None = size.node.maybe_as_int()
    return value
