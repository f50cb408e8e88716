"""The windows of a convolution that reads no element twice, which is a matmul: image to rows, and rows to image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

aten = torch.ops.aten

Call = Callable[..., Any]
"""Called with an operator and its arguments: runs it, or writes it into a graph."""


@dataclass(frozen=True)
class Windows:
    """Windows along each dimension of an image: what a 1x1 convolution reads, or the patches of an embedding.

    sizes: of a window. steps: from one window to the next, at least its size; what is left over is not read.
    """

    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    def rows(self, call: Call, x: Any, dims: int) -> Any:
        """[B, C, *image] as one row of K = C * prod(sizes) for each window, [B, *windows, K].

        Args:
            call: what to do with operators.
            x: [B, C, *image] or [C, *image].
            dims: how many that are.
        """
        batch = dims - 1 - len(self.sizes)
        cut = [index for index, pair in enumerate(zip(self.sizes, self.steps, strict=True)) if pair != (1, 1)]
        for index in cut:  # each adds a dimension at the end
            x = call(aten.unfold.default, x, batch + 1 + index, self.sizes[index], self.steps[index])
        x = call(
            aten.permute.default, x, [*range(batch), *range(batch + 1, dims), batch, *range(dims, dims + len(cut))]
        )
        return call(aten.flatten.using_ints, x, dims - 1) if cut else x

    def image(self, call: Call, rows: Any, dims: int) -> Any:
        """[B, *windows, N] as [B, N, *windows], in the memory of the rows."""
        batch = dims - 1 - len(self.sizes)
        return call(aten.permute.default, rows, [*range(batch), dims - 1, *range(batch, dims - 1)])


def windows_of(
    sizes: Sequence[int], steps: Sequence[int], padding: str | Sequence[int], dilation: Sequence[int], groups: int
) -> Windows | str:
    """The windows of a convolution; or why it is no matmul over rows that lie in its image.

    Args:
        sizes, steps, padding, dilation, groups: its settings, a number for each dimension, or one for all of them.
    """
    count = len(sizes)
    steps, dilation = (_each(given, count) for given in (steps, dilation))
    if groups != 1:
        return f"a convolution of {groups} groups, not a matmul"
    pairs = list(zip(sizes, steps, strict=True))
    if any(size > step for size, step in pairs):
        return "a convolution whose windows overlap, not a matmul"
    if any(size > 1 and gap > 1 for size, gap in zip(sizes, dilation, strict=True)):
        return "a convolution with gaps in its windows, not a matmul"
    # "same" adds nothing around windows of one element, and is refused by torch where steps are longer.
    pads = padding != "valid" and max(sizes) > 1 if isinstance(padding, str) else any(chain(_each(padding, count)))
    return "a convolution over padding, not a matmul" if pads else Windows(tuple(sizes), tuple(steps))


def _each(values: Sequence[int], count: int) -> Sequence[int]:
    return values if len(values) == count else [*values] * count
