"""Random calls of the ops, in every test run; `make fuzz` makes many more."""

from __future__ import annotations

import pytest

from lobcq_fx.kernels.bind import bind_cpu_core
from tests.fuzz.core import fuzz

pytestmark = pytest.mark.skipif(not bind_cpu_core(), reason="the CPU core was not built, or is switched off")


def test_random_calls_are_right_or_refused() -> None:
    counts = fuzz(2000, seed=0)
    assert min(counts["valid"], counts["broken"]) > 300
