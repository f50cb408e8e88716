"""Turns and ratios, on a clock that only the contenders advance."""

from __future__ import annotations

import gc
import itertools
from collections import Counter

import pytest

from lobcq_fx.benchmarking import race as module
from lobcq_fx.benchmarking.race import SETTLE_SECONDS, median_ratio, race


class Clock:
    """Stands in for `time`; contenders take as long as they say, times what a slow machine makes of it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.slept: list[float] = []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 1000.0  # which must not count
        self.slept.append(seconds)

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.log.append(name)
            self.now += seconds * self.slowness(len(self.slept))

        return run

    def slowness(self, turn: int) -> float:
        return 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_turn_is_an_untimed_call_and_then_the_burst(clock: Clock) -> None:
    times = race({"a": [clock.call("a0", 1.0), clock.call("a1", 2.0), clock.call("a2", 6.0)]}, rounds=2)
    assert clock.log == ["a2", "a0", "a1", "a2"] * 2
    assert times == {"a": [3.0, 3.0]}  # seconds per call; neither the pause nor the first call counts
    assert clock.slept == [SETTLE_SECONDS] * 2


def test_each_takes_one_turn_a_round_and_the_order_changes(clock: Clock) -> None:
    names = ["a", "b", "c", "d"]
    times = race({name: [clock.call(name, 1.0)] for name in names}, rounds=40)
    turns = clock.log[::2]
    rounds = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert len(rounds) == 40
    assert all(sorted(one) == names for one in rounds)
    assert all(len(times[name]) == 40 for name in names)
    followed = Counter(pair for one in rounds for pair in itertools.pairwise(one))
    assert len(followed) == 4 * 3, "somebody never runs behind somebody else"


def test_the_order_is_the_same_in_every_run(clock: Clock) -> None:
    contenders = {name: [clock.call(name, 1.0)] for name in "abc"}
    race(contenders, rounds=5)
    race(contenders, rounds=5)
    assert clock.log[:30] == clock.log[30:]


def test_a_machine_that_slows_down_changes_no_ratio(clock: Clock) -> None:
    clock.slowness = lambda turn: 4.0 ** ((turn - 1) // 2)
    contenders = {"ours": [clock.call("ours", 1.0)], "theirs": [clock.call("theirs", 2.0)]}
    times = race(contenders, rounds=4)
    assert times["ours"] == [1.0, 4.0, 16.0, 64.0]
    assert median_ratio(times["theirs"], times["ours"]) == 2.0


def test_the_median_ratio_is_of_rounds_not_of_medians() -> None:
    assert median_ratio([2.0, 40.0, 3.0], [1.0, 10.0, 1.0]) == 3.0
    with pytest.raises(ValueError, match="zip"):
        median_ratio([1.0, 2.0], [1.0])


def test_no_garbage_is_collected_meanwhile(clock: Clock) -> None:
    seen = []
    race({"a": [lambda: seen.append(gc.isenabled())]}, rounds=1)
    assert seen == [False, False]
    assert gc.isenabled()
