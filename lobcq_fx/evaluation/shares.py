"""Shares of items that came out right, with how far chance may have moved them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """value: from 0 to 1. stderr: its standard error, sqrt(p (1 - p) / (n - 1)); NaN of a single item."""

    value: float
    stderr: float


def share(right: Sequence[bool]) -> Share:
    """Of the items, at least one."""
    count = len(right)
    value = sum(right) / count
    return Share(value, math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else math.nan)
