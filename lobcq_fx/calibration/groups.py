"""The groups of an activation's rows that meet the matrices of a stack, and second moments of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.format.stacked import group_bounds

ROWS = 4096
"""Rows that one product sums."""

PRIOR = 0.25
"""Of K: so many rows, each the average of all groups' rows, are added to a group's own.

Few rows say little of what a matrix will meet in other directions; all groups together say nothing of what it meets
alone. With both a group of few rows is compensated better than by either, and one of many rows as by its own."""


def prior_rows(columns: int) -> int:
    """How many rows of all groups stand beside a group's own: those of a group that has fewer count for less."""
    return math.ceil(PRIOR * columns)


def with_prior(own: Tensor, together: Tensor, rows: int, columns: int) -> Tensor:
    """Sums over a group's own rows and `prior_rows`.

    Args:
        own: over the rows of the group.
        together: over the rows of all groups.
        rows: how many these are, of `columns` columns.
    """
    return own + together * (prior_rows(columns) / max(1, rows))


@dataclass(frozen=True)
class Groups:
    """Rows sorted by group.

    rows: [T, K]. bounds: first row, and the row behind the last, of each group.
    """

    rows: Tensor
    bounds: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, x: Tensor, offsets: Tensor | None) -> Groups:
        """The groups of an activation; rows of no group are left out.

        Args:
            x: [T, K] with offsets; [E, M, K] without, where rows of zeros are those of tokens for other experts.
            offsets: int32 [E], where each group ends.
        """
        if offsets is None:
            read = (x != 0).any(dim=-1)
            ends = read.sum(dim=1).cumsum(0).tolist()
            x = x[read]
        else:
            ends = offsets.tolist()
        bounds = tuple(group_bounds(ends, x.shape[0]))
        return cls(x[: bounds[-1][1]], bounds)

    @classmethod
    def one(cls, rows: Tensor) -> Groups:
        """All rows as one group."""
        return cls(rows, ((0, rows.shape[0]),))

    @property
    def counts(self) -> Tensor:
        """Rows of each group, int64 [E], on the CPU."""
        return torch.tensor([stop - start for start, stop in self.bounds], dtype=torch.int64, device="cpu")

    def of_group(self, index: int) -> Tensor:
        """The rows of a group, [n, K]."""
        return self.rows[slice(*self.bounds[index])]

    def split(self, size: int) -> Iterator[Groups]:
        """All rows, so many at a time; each part has all groups, most of them empty."""
        for first in range(0, self.rows.shape[0], size):
            rows = self.rows[first : first + size]
            ends = [stop - first for _, stop in self.bounds]
            yield Groups(rows, tuple(group_bounds(ends, rows.shape[0])))


class GroupMoments:
    """Sums of x^T x over the rows x that each matrix of a stack meets; made one after the other, as they are asked for.

    counts: rows of each group, int64 [E].
    """

    def __init__(self, calls: Sequence[Groups], encoded: Callable[[Tensor, int], Tensor]) -> None:
        """
        Args:
            calls: what the stack was multiplied with, at least once.
            encoded: what becomes of second moments [K, K] of it in a group before it is encoded.
        """
        self._calls, self._encoded = calls, encoded
        self.counts = torch.stack([one.counts for one in calls]).sum(0)

    def __add__(self, other: GroupMoments) -> GroupMoments:
        """Of a stack that meets both, which are encoded alike."""
        return GroupMoments((*self._calls, *other._calls), self._encoded)

    def of_group(self, index: int) -> Tensor:
        """fp32 [K, K], of a group's own rows and the prior ones; of a group that has none those of all groups."""
        if not self.counts[index]:
            return self._encoded(self._of_all, index)
        own = second_moments(one.of_group(index) for one in self._calls)
        return self._encoded(with_prior(own, self._of_all, int(self.counts.sum()), len(own)), index)

    @cached_property
    def _of_all(self) -> Tensor:
        return second_moments(one.rows for one in self._calls)


Moments = Tensor | GroupMoments
"""Second moments of what a weight meets: fp32 [K, K], or those of a stack."""


class SeenRows:
    """Gathers what second moments are made of: their sum, or where rows are of groups the rows themselves."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._groups: list[Groups] = []

    def add(self, x: Tensor) -> None:
        """Add an activation [..., K]."""
        self._sum = second_moments([x], self._sum)

    def add_groups(self, x: Tensor, offsets: Tensor | None) -> None:
        """Add one whose rows are of groups, as `Groups.of` takes it. A copy is kept: x may be written to later on."""
        groups = Groups.of(x, offsets)
        self._groups.append(Groups(groups.rows.clone(), groups.bounds))

    def state(self) -> dict[str, Any]:
        """All of it, for `restore`: tensors and numbers."""
        return {"sum": self._sum, "groups": [(one.rows, one.bounds) for one in self._groups]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was."""
        self._sum, self._groups = state["sum"], [Groups(*one) for one in state["groups"]]

    def moments(self, encoded: Callable[[Tensor, int], Tensor]) -> Moments:
        """Of all that was added, at least once; it is let go.

        encoded: what becomes of second moments [K, K] in a group before the weight is encoded; 0 is the only one where
            there are none.
        """
        total, groups, self._sum, self._groups = self._sum, self._groups, None, []
        if groups:
            return GroupMoments(groups, encoded)
        assert total is not None, "nothing was added"
        return encoded(total, 0)


@torch.no_grad()
def second_moments(activations: Iterable[Tensor], total: Tensor | None = None) -> Tensor:
    """The sum of x^T x, fp32 [K, K], over the rows x of activations [..., K], at least one, and `total`."""
    for x in activations:
        for rows in x.reshape(x.shape[:-1].numel(), x.shape[-1]).split(ROWS):
            rows = rows.float()
            product = rows.t() @ rows
            total = product if total is None else total.add_(product)
    assert total is not None
    return total
