"""A uniform sample of a stream of rows, in bounded memory."""

from __future__ import annotations

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
        self.num_seen += rows.shape[0]
        keys = torch.rand(rows.shape[0], dtype=torch.float64, device="cpu", generator=self._generator)
        if self._keys.numel() == self.capacity:
            chosen = (keys < self._keys[-1]).nonzero().flatten()
            keys, rows = keys[chosen], rows[chosen.to(rows.device)]
        merged = torch.cat((self._keys, keys))
        order = merged.argsort(stable=True)[: self.capacity]
        self._keys = merged[order]
        candidates = rows.detach().cpu() if self._rows is None else torch.cat((self._rows, rows.detach().cpu()))
        self._rows = candidates[order]

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
