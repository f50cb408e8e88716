"""Jobs under way: so many bytes, and no more."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch

from lobcq_fx.streaming.workers import Workers


def test_what_is_under_way_has_a_bound() -> None:
    go, waited = threading.Event(), threading.Event()
    with Workers(10) as workers:
        workers.submit(6, lambda: go.wait(30) and None)
        workers.wait_for_room(4)

        def wait() -> None:
            workers.wait_for_room(5)
            waited.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not waited.wait(0.2)
        go.set()
        assert waited.wait(30)
        waiting.join()
        workers.wait_for_room(1000)  # more than all of it, but alone


def test_what_a_job_holds_goes_before_its_bytes_are_given_back() -> None:
    tensor = torch.zeros(3)
    gone = weakref.ref(tensor)
    with Workers(3) as workers:
        workers.submit(3, tensor.sum)
        del tensor
        workers.wait_for_room(3)
        assert gone() is None


def test_the_first_failure_ends_the_work() -> None:
    def fail() -> None:
        raise ValueError("the first")

    workers = Workers(3)
    workers.submit(3, fail)
    with pytest.raises(ValueError, match="the first"):
        workers.wait_for_room(3)
    with pytest.raises(ValueError, match="the first"), workers:
        pass
