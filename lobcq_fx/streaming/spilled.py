"""What calls hold between two segments: in memory up to a bound, the rest in files."""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from lobcq_fx.observation import Values
from lobcq_fx.streaming.torch_files import write_values


class SpilledValues(MutableSequence[Values]):
    """A sequence of one call's values after the other."""

    def __init__(self, folder: Path, limit: int) -> None:
        """
        Args:
            folder: for files, new or with those of a process that was killed.
            limit: bytes of tensors that may be in memory.
        """
        folder.mkdir(exist_ok=True)
        self._folder, self._limit = folder, limit
        self._kept: list[Values | None] = []  # None for those in files
        self._sizes: list[int] = []

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Values: ...
    @overload
    def __getitem__(self, index: slice) -> MutableSequence[Values]: ...
    def __getitem__(self, index: int | slice) -> Values | MutableSequence[Values]:
        assert isinstance(index, int), "one at a time"
        kept = self._kept[index]
        if kept is not None:
            return kept
        found: Values = torch.load(self._file(index), weights_only=True)
        return found

    @overload
    def __setitem__(self, index: int, value: Values) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: Iterable[Values]) -> None: ...
    def __setitem__(self, index: int | slice, value: Any) -> None:
        assert isinstance(index, int), "one at a time"
        alone = {name: _alone(one) for name, one in value.items()}
        size = sum(one.nbytes for one in alone.values() if isinstance(one, Tensor))
        self._sizes[index] = 0
        if sum(self._sizes) + size <= self._limit:
            self._kept[index], self._sizes[index] = alone, size
            self._file(index).unlink(missing_ok=True)
        else:
            self._kept[index] = None
            write_values(self._file(index), alone)

    def insert(self, index: int, value: Values) -> None:
        """Add one at the end."""
        assert index == len(self), "at the end alone"
        self._kept.append(None)
        self._sizes.append(0)
        self[index] = value

    def __delitem__(self, index: int | slice) -> None:
        raise TypeError("calls stay until the end")

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.pt"


def _alone(value: Any) -> Any:
    """In memory of its own: a view would keep all that it is a part of."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value
