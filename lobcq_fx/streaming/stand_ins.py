"""Stand-ins: tensors that have a model's shapes and dtypes, and almost no memory.

All of one dtype look at the same random numbers, each from an address of its own, by which it is known again: traced
graphs hold the very memory of their model's parameters. A model of stand-ins runs like any other, so that the code that
traces real models, and compares their graphs with them, does the same for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

APART = 64
"""Bytes from the address of one to that of the next."""

SPREAD = 0.02
"""Standard deviation of what they hold: what models are initialized with."""

_TILE = 1 << 20


class StandIns:
    """Stand-ins for named tensors of given shapes and dtypes."""

    def __init__(self, wanted: Mapping[str, Tensor]) -> None:
        """wanted: tensors of any memory, on whose place they are to stand."""
        self._tensors: dict[str, Tensor] = {}
        for dtype in dict.fromkeys(one.dtype for one in wanted.values()):
            self._tensors |= _looking_at_one([(name, one) for name, one in wanted.items() if one.dtype == dtype], dtype)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def _looking_at_one(named: list[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    step = APART // dtype.itemsize
    memory = _numbers(max(one.numel() for _, one in named) + step * len(named), dtype)
    return {
        name: memory[place * step : place * step + one.numel()].view(one.shape)
        for place, (name, one) in enumerate(named)
    }


def _numbers(count: int, dtype: torch.dtype) -> Tensor:
    memory = torch.empty(count, dtype=dtype, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(0)
    tile = torch.empty(min(count, _TILE), dtype=torch.float32, device="cpu").normal_(0, SPREAD, generator=generator)
    for piece in memory.split(_TILE):
        piece.copy_(tile[: len(piece)])
    return memory
