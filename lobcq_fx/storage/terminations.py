"""Signals that end a process, turned into exceptions, so that `finally` blocks run as they do on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def terminations_unwind() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise SystemExit with the status that shells show for them.

    Handlers that the program has set itself stay, and so do all where Python calls none: outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    ours = [number for number, handler in before.items() if handler is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _unwind)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _unwind(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
