"""Time contenders against one another on a machine that others may use too.

All take turns, in an order that is shuffled anew for each round, and each round gives one ratio between any two of
them: a machine that is slow for a while slows both sides alike, and nobody always runs behind the same rival. What is
reported is the median of those ratios.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

SETTLE_SECONDS = 0.02
"""Before each turn, so that the worker threads of the one before have stopped spinning."""

T = TypeVar("T")
Found = TypeVar("Found")

Burst = Sequence[Callable[[], object]]
"""Calls that are timed together: one for each copy of a weight, say, so that none finds its weight in a cache."""


def race(contenders: Mapping[str, Burst], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of every contender in every round.

    A turn begins with the burst's last call, untimed: it wakes the threads and warms the code.
    """
    return take_turns(contenders, rounds, timed_turn)


def take_turns(contenders: Mapping[str, T], rounds: int, turn: Callable[[T], Found]) -> dict[str, list[Found]]:
    """What `turn` says of every contender in every round, seconds for example."""
    times: dict[str, list[Found]] = {name: [] for name in contenders}
    order = random.Random(0)  # orders that differ from round to round, but not from run to run
    with _no_collection():
        for _ in range(rounds):
            for name in order.sample(list(contenders), len(contenders)):
                times[name].append(turn(contenders[name]))
    return times


def median_ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Median over the rounds of how many times as long `slower` took."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def timed_turn(burst: Burst) -> float:
    """Seconds per call."""
    time.sleep(SETTLE_SECONDS)
    burst[-1]()
    start = time.perf_counter()
    for call in burst:
        call()
    return (time.perf_counter() - start) / len(burst)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection, whose pause would be one contender's bad luck."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
