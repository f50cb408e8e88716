"""A uniform sample of a stream of rows, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Reservoir:
    """Keeps at most `capacity` rows of a stream, each subset equally likely.

    Every row draws a random key and the rows with the smallest keys stay. The sample depends on the seed and on the
    rows' order, not on how the stream is cut into batches.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.num_seen = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64, device="cpu")
        self._rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Offer rows [n, width]; those kept are copied to the CPU in their own dtype."""
        self.offer(rows.shape[0], lambda chosen: rows[chosen], rows.device)

    def offer(self, count: int, rows: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """The same for `count` rows that are made where they may be kept: of indices int64 [m], [m, width]."""
        self.num_seen += count
        keys = torch.rand(count, dtype=torch.float64, device="cpu", generator=self._generator)
        full = self._keys.numel() == self.capacity and self.capacity > 0
        chosen = (keys < self._keys[-1] if full else keys >= 0).nonzero().flatten()
        candidates = rows(chosen.to(device)).detach().cpu()
        merged = torch.cat((self._keys, keys[chosen]))
        order = merged.argsort(stable=True)[: self.capacity]
        self._keys = merged[order]
        self._rows = candidates[order] if self._rows is None else torch.cat((self._rows, candidates))[order]

    def state(self) -> dict[str, Any]:
        """All of it, for `restore`: numbers and tensors."""
        return {
            "num_seen": self.num_seen, "keys": self._keys, "rows": self._rows, "generator": self._generator.get_state(),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another one of the same capacity was."""
        self.num_seen, self._keys, self._rows = state["num_seen"], state["keys"], state["rows"]
        self._generator.set_state(state["generator"])

    def replaced(self, rows: Tensor) -> Reservoir:
        """A reservoir with other rows in the place of each of these."""
        result = Reservoir(self.capacity, 0)
        result.num_seen, result._keys, result._rows = self.num_seen, self._keys, rows
        return result

    def rows(self) -> Tensor:
        """The sample so far, [min(capacity, num_seen), width], in random order.

        Raises:
            RuntimeError: nothing was ever added, so the width is unknown.
        """
        if self._rows is None:
            raise RuntimeError("the reservoir is empty: call add() first")
        return self._rows
