"""Who of the processes of one launch still works: each says so every second, in the store that they share.

No call here waits for another process: what waits holds the store's connection, and its timeout would end a long work.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EVERY = 1.0
"""Seconds from one sign of life to the next."""

SILENT = 300.0
"""Seconds without one after which a process is taken for dead. A call into a library may hold Python's lock for much of
a minute; who is killed on the same machine is noticed at once, and by torchrun on each machine."""

KILLED = "it has ended without a word, as what is killed does; the system kills where memory runs short"
GONE = f"nothing was heard of it for {SILENT:.0f} seconds: it stands still, or its machine is gone"

NO_SIGN = "0 0"
"""What stands where a process gives its signs before its first; each is a number of its own, and how much is done."""

_FAILURE, _ENDED = "failure", b"ended"


@dataclass(frozen=True)
class Member:
    """A process. place: what it has its process number in: a machine, or a container on it."""

    rank: int
    host: str
    place: str
    pid: int

    @classmethod
    def this(cls, rank: int) -> Member:
        """The one that runs this."""
        place = socket.gethostname()
        with suppress(OSError):  # of Linux
            place += f" {Path('/proc/sys/kernel/random/boot_id').read_text()} {Path('/proc/self/ns/pid').stat().st_ino}"
        return cls(rank, socket.gethostname(), place, os.getpid())

    def has_ended(self) -> bool:
        """Whether the system knows no such process any more; to be asked on its own place."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # somebody else's
            return False
        return False


@dataclass(frozen=True)
class Failure:
    """What ended the work: the rank that it happened to, where that runs, and what is known of it."""

    rank: int
    host: str
    why: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} failed: {self.why}"


def sign(rank: int) -> str:
    """The key under which a process gives its signs."""
    return f"alive/{rank}"


def blame(store: Any, failure: Failure) -> Failure:
    """Tell all of a failure; the first that was told, which is the cause of the others."""
    return Failure(**json.loads(store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))))


def _first_failure(store: Any) -> Failure | None:
    """The first that was told of."""
    return Failure(**json.loads(store.get(_FAILURE))) if store.check([_FAILURE]) else None


class Watch:
    """Gives this process's signs of life, and looks for those of the others, in a thread that runs from now on.

    done: how much this one has done. failure: what has happened to one of them.
    """

    def __init__(self, store: Any, this: Member, others: Sequence[Member]) -> None:
        self.done = 0
        self.failure: Failure | None = None
        self._store, self._this, self._others = store, this, others
        self._signs: dict[int, tuple[bytes, float]] = {}
        self._beats, self._lock, self._end = 0, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="lobcq-watch", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """No more signs."""
        self._end.set()

    def stop(self) -> None:
        """The same, and the others are told that nothing is wrong."""
        self._end.set()
        self._thread.join()
        self._store.set(sign(self._this.rank), _ENDED)

    def done_by_others(self) -> int:
        """How much the others have done, as far as they have said."""
        signs = [content for content, _ in tuple(self._signs.values()) if content != _ENDED]
        return sum(int(content.split()[1]) for content in signs)

    def look(self) -> None:
        """Look now."""
        with self._lock:
            self.failure = self.failure or _first_failure(self._store) or self._dead()

    def _run(self) -> None:
        while not self._end.wait(EVERY):
            try:
                self._give()
                self.look()
            except RuntimeError as error:  # torch's, of a connection
                self.failure = lost(self._this, error)
                return

    def _give(self) -> None:
        self._beats += 1
        self._store.set(sign(self._this.rank), f"{self._beats} {self.done}")

    def _dead(self) -> Failure | None:
        now = time.monotonic()
        for one, content in zip(self._others, self._read(self._others), strict=True):
            if one.rank not in self._signs or self._signs[one.rank][0] != content:
                self._signs[one.rank] = content, now
        for one in self._others:
            why = KILLED if one.place == self._this.place and one.has_ended() else ""
            why = why or (GONE if now - self._signs[one.rank][1] > SILENT else "")
            if why and self._read([one]) != [_ENDED]:  # it may have come to its end just now
                return blame(self._store, Failure(one.rank, one.host, why))
        return None

    def _read(self, members: Sequence[Member]) -> list[bytes]:
        found: list[bytes] = self._store.multi_get([sign(one.rank) for one in members]) if members else []
        return found


def lost(this: Member, error: Exception) -> Failure:
    """That this process does not reach the store any more."""
    text = next(iter(str(error).splitlines()), type(error).__name__)
    return Failure(
        this.rank, this.host, f"it has lost the others, whose launcher or machine has ended, or the network ({text})"
    )
