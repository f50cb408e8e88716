"""Settings for the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """`torch.empty` is filled: with NaN, and integers with their largest value."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(8).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def numpy_is_silent() -> Iterator[None]:
    """The interpreter computes with numpy, which warns of every division by zero and overflow. A GPU does not."""
    with np.errstate(all="ignore"):
        yield
