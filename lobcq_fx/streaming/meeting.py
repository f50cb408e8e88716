"""How the processes of a launch find each other in its store, whatever an earlier start of the launch has left there.

torchrun that starts its processes again gives them the store of those before. Each process therefore comes under a name
of its own, the first calls the roll until all that it names have answered, and what follows has a place of its own.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict
from typing import Any

from lobcq_fx.errors import RankError
from lobcq_fx.streaming.watch import NO_SIGN, Member, sign

MEETING = 600.0
"""Seconds that the first process waits for the last."""

POLL = 0.1
"""Seconds between two looks for what another process has to say."""


def meet(store: Any, this: Member, count: int) -> tuple[str, list[Member]]:
    """Wait for all processes of a launch.

    Returns:
        A word that they have in common, and no earlier start; and who they are, by rank. Under that word each has given
        its first sign of life.

    Raises:
        RankError: one has not come in time.
    """
    own, until, roll = asdict(this) | {"name": secrets.token_hex(8)}, time.monotonic() + MEETING, dict[str, Any]()
    store.set(_here(this.rank), json.dumps(own))
    while True:
        if this.rank == 0:
            roll = _called(store, count, roll)
        elif store.check(["roll"]):
            roll = json.loads(store.get("roll"))
        if roll and roll["members"][this.rank] == own:
            word = roll["word"]
            store.set(f"{word}/{sign(this.rank)}", NO_SIGN)
            if this.rank == 0 and store.check([f"{word}/{sign(rank)}" for rank in range(count)]):
                store.set(f"{word}/complete", "")
            if store.check([f"{word}/complete"]):
                return word, [Member(**{k: v for k, v in one.items() if k != "name"}) for one in roll["members"]]
        if time.monotonic() > until:
            raise RankError(f"{_missing(store, count)} in {MEETING:.0f} seconds: all ranks of a launch have to")
        time.sleep(POLL)


def _called(store: Any, count: int, roll: dict[str, Any]) -> dict[str, Any]:
    """The roll as it is, or a new one where others are here than it names."""
    keys = [_here(rank) for rank in range(count)]
    if not store.check(keys):
        return roll
    members = [json.loads(one) for one in store.multi_get(keys)]
    if roll and roll["members"] == members:
        return roll
    roll = {"word": secrets.token_hex(8), "members": members}
    store.set("roll", json.dumps(roll))
    return roll


def _missing(store: Any, count: int) -> str:
    missing = [rank for rank in range(count) if not store.check([_here(rank)])]
    return f"rank {missing[0]} of {count} has not called quantize_folder" if missing else "the ranks have not met"


def _here(rank: int) -> str:
    return f"here/{rank}"
