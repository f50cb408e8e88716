"""Jobs under way: so many bytes, and no more."""

from __future__ import annotations

import signal
import threading
import time
import weakref
from functools import partial

import pytest
import torch

from lobcq_fx.streaming.workers import AHEAD, WORKERS, Workers


def waits_for_room(workers: Workers, size: int, go: threading.Event) -> None:
    """There is none, and there is when `go` has let the jobs end."""
    waited = threading.Event()

    def wait() -> None:
        workers.wait_for_room(size)
        waited.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not waited.wait(0.2)
    go.set()
    assert waited.wait(30)
    waiting.join()


def test_what_is_under_way_has_a_bound() -> None:
    go = threading.Event()
    with Workers(10) as workers:
        workers.submit(6, lambda: go.wait(30) and None)
        workers.wait_for_room(4)
        waits_for_room(workers, 5, go)
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


class _AskedToEndError(BaseException):
    pass


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals to threads")
@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_ends_the_block_only_once_no_job_runs(signals: int) -> None:
    begun, ended = list[int](), list[int]()
    running, handled, go = threading.Barrier(3), threading.Semaphore(0), threading.Event()

    def job(number: int) -> None:
        begun.append(number)
        if number < 2:
            running.wait(30)
            go.wait(30)
        ended.append(number)

    def run() -> None:
        with Workers(100) as workers:
            for number in range(6):
                workers.submit(1, partial(job, number))

    def end(*_: object) -> None:
        handled.release()
        raise _AskedToEndError

    def interrupt() -> None:
        running.wait(30)
        for _ in range(signals):
            time.sleep(0.2)  # Python sees a signal late that comes right before it waits
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            handled.acquire(timeout=30)
        time.sleep(0.2)  # the block goes on to its end, and waits there
        go.set()

    before = signal.signal(signal.SIGUSR1, end)
    interrupting = threading.Thread(target=interrupt)
    try:
        interrupting.start()
        with pytest.raises(_AskedToEndError):
            run()
        assert sorted(ended) == sorted(begun) == [0, 1]
    finally:
        interrupting.join()
        signal.signal(signal.SIGUSR1, before)


def test_no_more_jobs_wait_than_workers_soon_take() -> None:
    go = threading.Event()
    with Workers(1000) as workers:
        for _ in range(WORKERS + AHEAD):
            workers.wait_for_room(1)
            workers.submit(1, lambda: go.wait(30) and None)
        waits_for_room(workers, 1, go)
