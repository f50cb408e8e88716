"""The processes of one launch that quantize a folder together, and what they tell each other.

They use the key-value store of the launch alone, and ask it again and again where they have to wait: a rank that is
early waits as long as it takes, and a rank that fails ends the others.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from lobcq_fx.errors import CheckpointError, LobcqError, RankError
from lobcq_fx.pipeline import Progress
from lobcq_fx.storage.terminations import terminations_unwind
from lobcq_fx.streaming.meeting import POLL, meet
from lobcq_fx.streaming.watch import Failure, Member, Watch, blame, lost

STEP = "encode"
"""The step of the work that the ranks share."""

PARTING = 30.0
"""Seconds that the first waits for the others to have heard that all is done: its end may be that of the store."""

PIECE = 4 * 2**20
"""Bytes of a value in the store, which refuses those of more than eight million."""

_works = itertools.count()


class Ranks:
    """This process among those of a launch.

    rank: its number. count: how many there are.
    """

    def __init__(self, store: Any = None, members: Sequence[Member] = (), rank: int = 0) -> None:
        """store: of these members alone; None where there are none but this process."""
        self.rank, self.count = rank, max(1, len(members))
        self._store, self._this = store, members[rank] if members else Member.this(rank)
        others = [one for one in members if one.rank != rank]
        self._watch = Watch(store, self._this, others) if others else None
        self._say: Callable[[], None] = lambda: None
        self._keys = itertools.count()

    @property
    def host(self) -> str:
        """The machine that this one runs on."""
        return self._this.host

    @property
    def first(self) -> bool:
        """Whether it is the one that writes what is nobody else's, and that reports."""
        return self.rank == 0

    def shared(self, make: Callable[[], Any]) -> Any:
        """What the first rank makes, JSON-ready, for all of them; all have to call this."""
        key = f"shared/{next(self._keys)}"
        if self.first:
            value = make()
            if self.count > 1:
                self._send(key, value)
            return value
        return self._receive(key)

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, JSON-ready, in the first; all have to call this, and the first waits for the last."""
        key = f"gathered/{next(self._keys)}"
        if not self.first:
            self._send(f"{key}/{self.rank}", value)
            return []
        return [value, *(self._receive(f"{key}/{rank}") for rank in range(1, self.count))]

    def check_same(self, work: Mapping[str, Any]) -> None:
        """That all ranks were called for the same.

        Raises:
            CheckpointError: names what differs.
        """
        own, first = json.loads(json.dumps(work)), self.shared(lambda: work)
        differing = sorted(key for key in own.keys() | first.keys() if own.get(key) != first.get(key))
        if not self.first and differing:
            raise CheckpointError(
                f"rank {self.rank} on {self._this.host} has other {', '.join(differing)} than rank 0. Remedy: call all"
                " ranks alike, with one source that all of them see"
            )
        self.gathered(None)

    def reporting(self, report: Progress) -> Progress:
        """What a rank reports to, of which the first makes one report.

        Raises, when it is called:
            RankError: another rank has failed.
        """

        def note(step: str, done: int, total: int | None) -> None:
            self.check()
            watch = self._watch
            if watch is not None and step == STEP:
                watch.done = done
                if self.first:
                    self._say = lambda: report(step, _at_most(watch.done + watch.done_by_others(), total), total)
                self._say()
            elif self.first:
                report(step, done, total)

        return report if self.count == 1 else note

    def check(self) -> None:
        """That no other rank has failed.

        Raises:
            RankError: which one, and why.
        """
        failure = self._watch.failure if self._watch is not None else None
        if failure is not None:
            raise RankError(str(failure))

    def _send(self, key: str, value: Any) -> None:
        content = json.dumps(value).encode()
        pieces = [content[at : at + PIECE] for at in range(0, len(content), PIECE)]
        for place, piece in enumerate(pieces):
            self._store.set(f"{key}/{place}", piece)
        self._store.set(key, str(len(pieces)))

    def _receive(self, key: str, limit: float | None = None) -> Any:
        self._wait(key, limit)
        pieces = [self._store.get(f"{key}/{place}") for place in range(int(self._store.get(key)))]
        return json.loads(b"".join(pieces))

    def _wait(self, key: str, limit: float | None) -> None:
        started = time.monotonic()
        while not self._store.check([key]):
            if limit is not None and time.monotonic() - started > limit:
                raise TimeoutError(key)
            self.check()
            self._say()
            time.sleep(POLL)

    def part(self) -> None:
        """The end of a work that went well, whatever becomes of the others now."""
        assert self._watch is not None
        with suppress(TimeoutError, RankError, RuntimeError):
            if not self.first:
                self._send(f"heard/{self.rank}", None)
            self._watch.stop()
            for rank in range(1, self.count) if self.first else ():
                self._receive(f"heard/{rank}", PARTING)

    def fail(self, error: BaseException) -> None:
        """Tell the others of what ends this rank.

        Raises:
            RankError: another one had failed before, of which this is only what follows.
        """
        if self.count == 1:
            return
        own = Failure(self.rank, self._this.host, _text(error))
        try:
            if self._watch is not None:
                self._watch.look()
            cause = blame(self._store, own)
        except RuntimeError as broken:  # torch's, of a connection
            cause = own if isinstance(error, LobcqError) else lost(self._this, broken)
        if self._watch is not None:
            self._watch.leave()
        if cause != own and not isinstance(error, (LobcqError, KeyboardInterrupt)):
            raise RankError(str(cause)) from error


def _at_most(done: int, total: int | None) -> int:
    """The first reports the whole when all are done, of which others have last said a part."""
    return done if total is None else min(done, total)


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun has launched, or of an initialized process group, once all are there.

    SIGTERM and SIGHUP end the block as an exception would: torchrun sends them where one of its processes has ended.

    Raises:
        RankError: another rank failed, or did not come.
    """
    store, rank, count = _launch()
    if count == 1:
        yield Ranks()
        return
    with terminations_unwind():
        ranks = _met(store, rank, count)
        try:
            yield ranks
        except BaseException as error:
            ranks.fail(error)
            raise
        ranks.part()


def rank_and_count() -> tuple[int, int]:
    """This process's number, and of how many, as `joined` would have them."""
    if not dist.is_available():
        return 0, 1
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if dist.is_torchelastic_launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def _met(store: Any, rank: int, count: int) -> Ranks:
    """This process among the others, once they are there."""
    from torch.distributed.distributed_c10d import PrefixStore

    this = Member.this(rank)
    try:
        word, members = meet(store, this, count)
        return Ranks(PrefixStore(word, store), members, rank)
    except RuntimeError as error:  # torch's, of a connection
        raise RankError(str(lost(this, error))) from error


def _launch() -> tuple[Any, int, int]:
    """The store of the launch, this process's number, and of how many."""
    rank, count = rank_and_count()
    if count == 1:
        return None, 0, 1
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        store = _get_default_store()
    else:
        store, rank, count = next(iter(rendezvous("env://")))
    return PrefixStore(f"lobcq_fx/{next(_works)}", store), rank, count


def _text(error: BaseException) -> str:
    if isinstance(error, (LobcqError, OSError)):
        return str(error)
    if isinstance(error, SystemExit):
        return "a signal has ended it"
    return f"{type(error).__name__}: {error}"
