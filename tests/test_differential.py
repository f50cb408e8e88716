"""Random modules at random sizes: the model's result, or an error, and never another result."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lobcq_fx.tracing.guards import SizeGuards
from tests.differential.compare import DifferentError, compare
from tests.differential.modules import Generated


def test_random_modules_give_what_the_model_gives_or_refuse():
    counts: Counter[str] = Counter()

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(st.integers(0, 2**31))
    def run(seed):
        counts.update(compare(seed).counts)

    run()
    assert counts["served"] > counts["modules"]
    assert counts["refused_modules"] < counts["modules"] / 4


def test_a_silent_difference_would_be_found(monkeypatch):
    monkeypatch.setattr(SizeGuards, "check", lambda *_: None)
    assert any(_differs(seed) for seed in range(40))


def _differs(seed):
    try:
        compare(seed)
    except DifferentError:
        return True
    return False


def test_the_same_seed_makes_the_same_module():
    one, other = Generated(7), Generated(7)
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert isinstance(one, nn.Module)
