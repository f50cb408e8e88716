"""A few threads that work on what one other reads, with a bound on the bytes that are under way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

WORKERS = 2
"""The kernels that encode have threads of their own: one worker encodes while another looks at its results."""

AHEAD = 2
"""Jobs that wait while as many as there are workers run: more would hold memory and gain nothing."""


class Workers:
    """Runs jobs, none of which outlives the block, however that ends: after it, files that jobs write to may be closed.

    The first job that fails ends the work: what it raised is raised where the next is waited for. Where the block ends
    with an exception, a signal's too, jobs that have not begun are left out.
    """

    def __init__(self, limit: int) -> None:
        """limit: bytes that may be under way; more only if it is a single job's."""
        self._limit, self._under_way = limit, 0
        self._left, self._running, self._ending = 0, 0, False
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="lobcq-encode")

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait_for_all()
        finally:
            self._end()

    @property
    def under_way(self) -> int:
        """Bytes that jobs hold."""
        return self._under_way

    def wait_for_room(self, size: int) -> None:
        """Until a job of so many bytes more may be under way."""
        self._wait_for(
            lambda: not self._under_way or (self._under_way + size <= self._limit and self._left < WORKERS + AHEAD)
        )

    def wait_for_all(self) -> None:
        """Until all jobs are done."""
        self._wait_for(lambda: not self._left)

    def submit(self, size: int, job: Callable[[], None]) -> None:
        """Run a job that holds so many bytes."""
        with self._changed:
            self._under_way += size
            self._left += 1
        self._pool.submit(self._run, size, [job])

    def _run(self, size: int, job: list[Callable[[], None]]) -> None:
        with self._changed:
            if self._ending:
                return
            self._running += 1
        error: BaseException | None = None
        try:
            job.pop()()  # nobody else has it: what it holds goes before its bytes are given back
        except BaseException as raised:
            error = raised
        with self._changed:
            self._under_way -= size
            self._left -= 1
            self._running -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def _wait_for(self, done: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or done())
        if self._error is not None:
            raise self._error

    def _end(self) -> None:
        """Let no more jobs begin, and wait for those that run; an interruption of this is raised after it.

        `shutdown` alone does not wait so: of a thread whose join was interrupted, Python believes that it has ended.
        """
        interruption: BaseException | None = None
        ended = False
        while not ended:
            try:
                with self._changed:
                    self._ending = True
                    self._changed.wait_for(lambda: not self._running)
                self._pool.shutdown(cancel_futures=True)
                ended = True
            except BaseException as raised:  # of a signal
                interruption = raised
        if interruption is not None:
            raise interruption
