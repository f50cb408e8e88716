"""Settings for every test, and tests under another default dtype."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything imports triton, which reads it when kernels are defined. "0" runs their tests on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

# Test tensors are tiny: a second thread costs more than it brings, above all where cores are shared. Here, and in the
# processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

DEFAULT_DTYPE = "LOBCQ_TEST_DEFAULT_DTYPE"
"""Environment variable: the tests run under this default dtype ("bfloat16"), their own tensors excepted."""

TESTS = str(Path(__file__).parent)


class TestsInFloat32(TorchFunctionMode):
    """What a test makes by itself stays fp32: the default dtype is for the code that it calls."""

    __test__ = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _device_constructors() or not sys._getframe(1).f_code.co_filename.startswith(TESTS):
            return func(*args, **(kwargs or {}))
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    wanted = os.environ.get(DEFAULT_DTYPE)
    if wanted is None:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, wanted))
    with TestsInFloat32():
        yield
    torch.set_default_dtype(before)


@pytest.fixture
def traced_once() -> Iterator[None]:
    """Models of one configuration with the same weights are traced once a session, unless an example matters."""
    from tests import traces

    with traces.traced_once():
        yield
