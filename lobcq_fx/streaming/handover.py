"""Calibration by several ranks: each runs its own calls, and what is seen goes from one to the next.

What is summed up is summed in the order of the calls, whichever rank runs them: a rank takes over what those before it
have seen in a segment, adds its own, and hands it on. Segments follow each other, so that all ranks are at work, each
at another segment. What the last one has seen is everything; the segments are encoded by the ranks in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lobcq_fx.observation import Observed
from lobcq_fx.passes.insert_observers import Observer
from lobcq_fx.streaming.ranks import Ranks
from lobcq_fx.streaming.torch_files import write_values

_POLL = 0.05


class Handover:
    """The rank's part of it."""

    def __init__(self, ranks: Ranks, folder: Path, encode: Callable[[Observed], None]) -> None:
        """
        Args:
            ranks: of the launch.
            folder: which all of them see, empty.
            encode: called for the segments that are this rank's to encode, when all calls have run through them.
        """
        self._ranks, self._folder, self._encode = ranks, folder, encode
        self._waiting: dict[int, tuple[Sequence[Observer], Observed]] = {}

    def receive(self, index: int, observers: Sequence[Observer]) -> None:
        """Wait for what the ranks before this one have seen of a segment."""
        if self._ranks.rank:
            self._restore(self._file(index, self._ranks.rank - 1), observers)

    def pass_on(self, observers: Sequence[Observer], seen: Observed) -> None:
        """Hand on what all ranks up to this one have seen; then encode what is ready."""
        file = self._file(seen.index, self._ranks.rank)
        write_values(file.with_suffix(".partial"), [one.state() for one in observers])
        file.with_suffix(".partial").rename(file)
        if seen.index % self._ranks.count == self._ranks.rank:
            self._waiting[seen.index] = observers, seen
        self.encode(wait=False)

    def encode(self, *, wait: bool) -> None:
        """Encode this rank's segments, those that all calls have run through; or all, once they have."""
        for index in sorted(self._waiting):
            file = self._file(index, self._ranks.count - 1)
            if wait or file.exists():
                observers, seen = self._waiting.pop(index)
                self._restore(file, observers)
                self._encode(seen)

    def _restore(self, file: Path, observers: Sequence[Observer]) -> None:
        while not file.exists():
            self._ranks.check()
            time.sleep(_POLL)
        states: list[dict[str, Any]] = torch.load(file, weights_only=True)
        file.unlink()  # nobody else reads it
        for one, state in zip(observers, states, strict=True):
            one.restore(state)

    def _file(self, index: int, rank: int) -> Path:
        return self._folder / f"{index}-{rank}.pt"


def own_calls(calls: Sequence[Any], ranks: Ranks) -> Sequence[Any]:
    """A rank's share: in their order, those of the first rank first."""
    first, end = (len(calls) * rank // ranks.count for rank in (ranks.rank, ranks.rank + 1))
    return calls[first:end]
