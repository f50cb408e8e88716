"""Settings for the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

if find_spec("triton") is not None:
    from tests.kernels.triton.interpreter import patch_the_language_once_a_launch

    patch_the_language_once_a_launch()


class WithoutTriton(pytest.Module):
    """A module of tests that cannot be imported."""

    def collect(self) -> NoReturn:
        pytest.skip("triton is not installed (pip install 'lobcq-fx[triton]')", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip every module here, saying why, where there is no Triton: the kernels' modules import it."""
    return WithoutTriton.from_parent(parent, path=module_path) if find_spec("triton") is None else None


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
