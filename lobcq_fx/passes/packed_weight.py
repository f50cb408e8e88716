"""A packed weight as a module: buffers named as they are stored, indifferent to dtype casts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lobcq_fx.format import Encoded

PARTS = ("codes", "selectors", "scales", "tensor_scale")


class PackedWeight(nn.Module):
    """Holds an encoded weight [N, K] in place of the float parameter, so that its buffers are `<parameter>.codes`, ...

    `.to(device)` moves them; `.half()` and the like leave them alone: they are the format's bytes, not numbers.
    """

    codes: Tensor
    selectors: Tensor
    scales: Tensor
    tensor_scale: Tensor

    def __init__(self, encoded: Encoded) -> None:
        super().__init__()
        for part in PARTS:
            self.register_buffer(part, getattr(encoded, part))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        # fn sees bytes, which no dtype cast touches.
        for part in PARTS:
            buffer = getattr(self, part)
            moved = fn(buffer.reshape(-1).view(torch.uint8))
            setattr(self, part, moved.view(buffer.dtype).view(buffer.shape))
        return self
