"""Long parametrizations: what every run takes of them, and what waits for `make nightly`, which takes the rest.

Whatever has a code path of its own belongs to every run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import product
from typing import Any

import pytest


def sweep(members: Iterable[Any], daily: Collection[Any]) -> list[Any]:
    """The members as parameters, in their order. Those that are not among `daily` are marked nightly."""
    members = list(members)
    assert all(one in members for one in daily), f"{daily} are not all among {members}"
    return [one if one in daily else pytest.param(one, marks=pytest.mark.nightly) for one in members]


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """Every combination of the axes' values as parameters. Every run has each value in a combination; the others are
    marked nightly.

    The daily ones go along all axes at once, and a short axis begins one value later each time that it begins again:
    two axes whose values repeat in the same rhythm meet in more than one way.
    """
    steps = range(max(map(len, axes)))
    daily = {tuple((step + step // len(axis)) % len(axis) for axis in axes) for step in steps}
    return [
        pytest.param(
            *(axis[place] for axis, place in zip(axes, places, strict=True)),
            id="-".join(_name(axis[place]) for axis, place in zip(axes, places, strict=True)),
            marks=() if places in daily else pytest.mark.nightly,
        )
        for places in product(*map(range, map(len, axes)))
    ]


def _name(value: Any) -> str:
    name = getattr(value, "name", value)
    return str(name).removeprefix("torch.")
