"""Random modules at random sizes: the model's result, or an error, and never another result."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.differential.compare import DifferentError, compare
from tests.differential.modules import Generated

SEEN: Counter[str] = Counter()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(st.integers(0, 2**31))
def test_random_modules_give_what_the_model_gives_or_refuse(seed):
    SEEN.update(compare(seed))


def test_most_of_the_random_calls_are_served():
    counts = sum((compare(seed) for seed in range(12)), Counter())
    assert counts["served"] > 12
    assert counts["refused_modules"] < 6


def test_a_silent_difference_would_be_found(monkeypatch):
    from lobcq_fx.tracing.guards import SizeGuards

    monkeypatch.setattr(SizeGuards, "check", lambda *_: None)
    found = 0
    for seed in range(40):
        try:
            compare(seed)
        except DifferentError:
            found += 1
    assert found > 2


def test_the_same_seed_makes_the_same_module():
    one, other = Generated(7), Generated(7)
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert isinstance(one, nn.Module)
