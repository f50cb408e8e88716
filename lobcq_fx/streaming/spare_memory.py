"""Memory for large tensors that come and go: what one leaves is given to the next of its size.

New memory comes from the system page by page, each filled with zeros first, which can take longer than reading a
tensor into it. Layers that are alike have tensors of the same few sizes.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

LEAST = 2**20
"""Bytes from which on memory is kept: what is smaller, malloc gives again by itself."""


class SpareMemory:
    """Given out by one thread; it comes back in whichever thread the last reference to a tensor goes."""

    def __init__(self) -> None:
        self._spare: list[mmap.mmap] = []
        self._returned: deque[mmap.mmap] = deque()  # the one thing that other threads touch
        self._given = 0

    @property
    def given(self) -> int:
        """Bytes that are in use."""
        self._gather()
        return self._given

    @property
    def spare(self) -> int:
        """Bytes that are kept for later."""
        self._gather()
        return sum(map(len, self._spare))

    def take(self, size: int, most: int) -> Tensor:
        """Uint8 [size], of any content.

        Args:
            size: in bytes.
            most: bytes that may be kept for later while this is in use. More are given back to the system, those first
                that have waited longest.
        """
        self._gather()
        if size < LEAST:
            return torch.empty(size, dtype=torch.uint8, device="cpu")
        fitting = [place for place, block in enumerate(self._spare) if len(block) == size]
        block = self._spare.pop(fitting[-1]) if fitting else None
        left = sum(map(len, self._spare))
        while self._spare and left > most:
            left -= len(self._spare.pop(0))
        if block is None:
            block = _new(size)
        view = memoryview(block)
        self._given += size
        weakref.finalize(view, self._returned.append, block).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)  # whose storage has the only reference to `view`

    def _gather(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._given -= len(block)
            self._spare.append(block)


def _new(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # of systems without: then its pages are small
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
