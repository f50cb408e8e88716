"""What races: a linear with one fixed weight, ours or a peer's, and the check that it computes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.benchmarking.race import Burst
from lobcq_fx.errors import LobcqError

COLD_ROWS = 8
"""Up to as many rows a linear is timed on weights that no cache holds, as when a model writes one token."""

COLD_BYTES = 128 << 20
"""What a burst over cold weights goes through in total: several times a large cache."""

MOST_COPIES = 100
"""Of one weight; those of 1.3 MiB and less may thus be found in a cache."""

CHECKED_ROWS = 16


class WrongProductError(LobcqError):
    """A linear computes something else: it gets no speed."""


Call = Callable[[Any], Any]
"""A linear: from an activation, as `Contender.accept` returns it, to its product."""


def _as_it_is(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Contender:
    """A linear with a fixed weight [N, K], in as many copies as are asked for.

    Args:
        weight_bytes: that one call reads of its own copy's memory.
        copy: makes a linear whose weight lies in memory of its own.
        accept: an activation, fp32 [M, K], as this linear's users have it in hand; not timed.
        product: what the linear returned, as a tensor [M, N]; not timed.
    """

    weight_bytes: int
    copy: Callable[[], Call]
    accept: Callable[[Tensor], Any] = _as_it_is
    product: Callable[[Any], Tensor] = _as_it_is


class Starter:
    """A contender on its way to the start: its copies are made once and serve every number of rows."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self._copies = [contender.copy()]

    def check(self, x: Tensor, expected: Tensor, tolerance: float) -> None:
        """Compare the product of x [M, K] with the rows of it that `checked_rows` names.

        Args:
            expected: fp64 [rows, N].
            tolerance: relative error in norm.

        Raises:
            WrongProductError: the error is larger, or not a number.
        """
        actual = self.contender.product(self._copies[0](self.contender.accept(x)))
        error = float((checked_rows(actual).double() - expected).norm() / expected.norm())
        if not error <= tolerance:
            raise WrongProductError(f"the product is wrong: relative error {error:.3g}, at most {tolerance:g} expected")

    def burst(self, x: Tensor) -> Burst:
        """One call for each copy that x [M, K] needs, each of them made once already.

        Some lay out a weight, or choose kernels, in their first call with a number of rows.
        """
        wanted = copies_needed(self.contender.weight_bytes, x.shape[0])
        while len(self._copies) < wanted:
            self._copies.append(self.contender.copy())
        accepted = self.contender.accept(x)
        calls = [partial(copy, accepted) for copy in self._copies[:wanted]]
        for call in calls:
            call()
        return calls


def copies_needed(weight_bytes: int, rows: int) -> int:
    """How many copies of a weight a burst walks through: more than COLD_BYTES of them, or one where it may be warm."""
    if rows > COLD_ROWS:
        return 1
    # Two at least: a turn begins with a call on the last one.
    return min(MOST_COPIES, max(2, COLD_BYTES // weight_bytes + 1))


def checked_rows(x: Tensor) -> Tensor:
    """The first and last rows, CHECKED_ROWS of them at most."""
    if x.shape[0] <= CHECKED_ROWS:
        return x
    return torch.cat((x[: CHECKED_ROWS // 2], x[-CHECKED_ROWS // 2 :]))
