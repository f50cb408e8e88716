"""A few threads that work on what one other reads, with a bound on the bytes that are under way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

WORKERS = 2
"""The kernels that encode have threads of their own: one worker encodes while another looks at its results."""


class Workers:
    """Runs jobs. The first that fails ends the work: what it raised is raised where the next is waited for."""

    def __init__(self, limit: int) -> None:
        """limit: bytes that may be under way; more only if it is a single job's."""
        self._limit, self._under_way = limit, 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="lobcq-encode")

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._raise()

    def wait_for_room(self, size: int) -> None:
        """Until so many bytes more may be under way."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or not self._under_way or self._under_way + size <= self._limit
            )
        self._raise()

    def submit(self, size: int, job: Callable[[], None]) -> None:
        """Run a job that holds so many bytes."""
        with self._changed:
            self._under_way += size
        self._pool.submit(self._run, size, [job])

    def _run(self, size: int, job: list[Callable[[], None]]) -> None:
        error: BaseException | None = None
        try:
            job.pop()()  # nobody else has it: what it holds goes before its bytes are given back
        except BaseException as raised:
            error = raised
        with self._changed:
            self._under_way -= size
            self._error = self._error or error
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
