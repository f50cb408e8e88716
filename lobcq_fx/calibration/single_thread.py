"""One thread for loops of many small tensor operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread() -> Iterator[None]:
    """Run on one thread; usable as a decorator too.

    The fit's operations are too small to gain from a second thread. On a machine whose cores are busy they lose by one,
    because the threads of each operation wait for one another.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
