"""Signals that end a process, turned into exceptions, so that `finally` blocks run as they do on Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


AGAIN = 0.01
"""Seconds until a signal whose exception went nowhere is sent again."""


class _Terminated(SystemExit):
    """By a signal, with the status that shells show for it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def terminations_unwind() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise SystemExit with the status that shells show for them.

    Python drops what is raised in a callback, of a weak reference for example: then the signal is sent once more.
    Handlers that the program has set itself stay, and so do all where Python calls none: outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    ours = [number for number, handler in before.items() if handler is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _unwind)
    hook = sys.unraisablehook

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        if isinstance(unraisable.exc_value, _Terminated):
            threading.Timer(AGAIN, os.kill, (os.getpid(), unraisable.exc_value.number)).start()
        else:
            hook(unraisable)

    sys.unraisablehook = dropped if ours else hook
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number in ours:
            signal.signal(number, before[number])


def _unwind(number: int, frame: FrameType | None) -> None:
    raise _Terminated(number)
