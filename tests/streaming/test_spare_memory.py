"""Memory of large tensors: given again to those of the same size, and never more than was allowed."""

from __future__ import annotations

import gc

import torch

from lobcq_fx.streaming.spare_memory import LEAST, SpareMemory


def test_what_a_tensor_leaves_goes_to_the_next_of_its_size() -> None:
    memory = SpareMemory()
    first = memory.take(LEAST, 10 * LEAST)
    address, view = first.data_ptr(), first.view(torch.bfloat16).view(2, -1)[1:]
    del first
    assert (memory.given, memory.spare) == (LEAST, 0)  # the view has it
    other = memory.take(LEAST, 10 * LEAST)
    assert other.data_ptr() != address
    del view
    assert (memory.given, memory.spare) == (LEAST, LEAST)
    assert memory.take(2 * LEAST, 10 * LEAST).data_ptr() != address
    again = memory.take(LEAST, 10 * LEAST)
    assert again.data_ptr() == address
    again.fill_(7)
    assert not bool((other == 7).any())


def test_no_more_is_kept_than_is_allowed_the_oldest_going_first() -> None:
    memory = SpareMemory()
    tensors = [memory.take(size * LEAST, 0) for size in (3, 1, 2)]
    while tensors:
        tensors.pop(0)
    assert (memory.given, memory.spare) == (0, 6 * LEAST)
    held = memory.take(4 * LEAST, 3 * LEAST)
    assert (memory.given, memory.spare) == (4 * LEAST, 3 * LEAST)
    fitting = memory.take(2 * LEAST, 0)  # what fits is used, all else goes
    assert (memory.given, memory.spare) == (6 * LEAST, 0)
    del held, fitting
    assert memory.take(LEAST, -1).numel() == LEAST
    assert memory.spare == LEAST


def test_small_tensors_are_malloc_s() -> None:
    memory = SpareMemory()
    for size in (0, 1, LEAST - 1):
        assert memory.take(size, 0).shape == (size,)
        assert (memory.given, memory.spare) == (0, 0)


def test_a_tensor_outlives_what_gave_it() -> None:
    memory = SpareMemory()
    tensor = memory.take(LEAST, 0).fill_(3)
    del memory
    gc.collect()
    assert bool((tensor == 3).all())
