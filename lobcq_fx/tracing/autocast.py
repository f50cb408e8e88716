"""Ambient autocast, which has no part in a quantized model: its graph has the dtypes that it was captured with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def no_autocast() -> Iterator[None]:
    """Capture or export what is called in here without `torch.autocast`, on all devices. Also a decorator."""
    with ExitStack() as stack:
        for device_type in DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def without_autocast(graph: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
    """Run a captured graph: caches, residuals and results have the dtypes that it was captured with.

    Dynamo can trace it, unlike `no_autocast`.
    """
    device_type = inputs[0].device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return graph(*inputs)
    with torch.autocast(device_type, enabled=False):
        return graph(*inputs)
