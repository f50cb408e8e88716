"""How fast this machine reads memory: the bound on a product of one row, which reads its weight once.

Several vectorised readers compete, since none is the fastest with every number of threads. Where they agree, memory is
what holds them up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lobcq_fx.benchmarking.contender import copies_needed
from lobcq_fx.benchmarking.race import Burst


def _dot(x: Tensor) -> Tensor:
    return torch.dot(x, x)


READERS: dict[str, Callable[[Tensor], Tensor]] = {"read: sum": torch.sum, "read: max": torch.max, "read: dot": _dot}

MODEL_BYTES = 1 << 28
"""To read at once in place of a model: two such copies are larger than caches."""


def reading_bursts(size: int) -> dict[str, Burst]:
    """For each reader a burst over as many copies of `size` bytes as a weight of that size has at one row."""
    copies = [torch.ones(size // 4, dtype=torch.float32, device="cpu") for _ in range(copies_needed(size, rows=1))]
    return {name: [partial(read, one) for one in copies] for name, read in READERS.items()}


def read_rate(times: Mapping[str, Sequence[float]], size: int) -> float:
    """Bytes a second of the fastest reader, by its median in a race of `reading_bursts(size)`."""
    return size / min(statistics.median(times[reader]) for reader in READERS)
