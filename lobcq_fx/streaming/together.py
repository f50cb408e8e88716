"""The work of all ranks of a launch in one unfinished folder: made, laid out and put in place by the first of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lobcq_fx.errors import CheckpointError
from lobcq_fx.pipeline import Progress
from lobcq_fx.storage.atomic_folder import MODEL, resumed_folder, unfinished
from lobcq_fx.storage.checkpoint import is_checkpoint, is_own
from lobcq_fx.storage.journal import Journal, entries_of_all
from lobcq_fx.storage.weights_file import check_room, lay_out, weights_files
from lobcq_fx.streaming.emission import Emission
from lobcq_fx.streaming.ranks import STEP, Ranks
from lobcq_fx.streaming.shares import shares
from lobcq_fx.streaming.transfer import Finished, Parameters, transfer

JOURNAL = "journal"

APPEARS = 90.0
"""Seconds until a file that one machine has written is there for another: NFS may remember for sixty that it is not."""


@contextmanager
def one_folder(ranks: Ranks, output: Path) -> Iterator[Path]:
    """Yield the folder beside `output` that outlives a block that does not end well, the same one in all ranks.

    Raises:
        CheckpointError: `output` cannot be written; or a rank does not see what the first one writes.
        OSError: the disk is full, or fails.
    """
    if ranks.first:
        with resumed_folder(output, is_checkpoint, is_own, lambda found: bool(_begun(found))) as place:
            try:
                _check_seen(ranks, place)
                yield place
            except BaseException as error:
                ranks.fail(error)  # before the folder goes, in which the others write
                raise
    else:
        _check_seen(ranks, unfinished(output))
        yield unfinished(output)


def transfer_together(
    ranks: Ranks, place: Path, work: Mapping[str, Any], parameters: Parameters, progress: Progress
) -> dict[str, Finished]:
    """Encode and write what no journal in a folder has, each rank its share, and note it in a journal of its own.

    Args:
        ranks: which are all to call this.
        place: the folder, of `one_folder`.
        work: what a journal has to be of.
        parameters: what is to be read, and what becomes of it.
        progress: called by the first rank alone, with what all have done.

    Returns:
        In the first rank, when all are done, what was stored of every parameter; else of this one's.

    Raises:
        CheckpointError: the source cannot be read; what was begun was begun with other settings.
        RankError: another rank has failed.
        LobcqError: a weight holds NaN or infinity.
        OSError: the disk is full, or fails.
    """
    emission = parameters.emission
    name = f"{JOURNAL}-{ranks.rank}" if ranks.rank else JOURNAL
    journal = Journal(place / name, work)
    try:
        begun = ranks.shared(lambda: _begin(place, work, emission, ranks.count))[ranks.rank]
        share = {name: None if entry is None else Finished.from_dict(entry) for name, entry in begun.items()}
        with weights_files(place / MODEL, emission.shards.files, emission.tensors) as files:
            done = transfer(parameters, files, journal, share, progress)
    finally:
        journal.close()
    for one in ranks.gathered({name: one.to_dict() for name, one in done.items()}):
        done |= {name: Finished.from_dict(entry) for name, entry in one.items()}
    total = len(emission.plan.weights)
    progress(STEP, total, total)
    return done


def _begin(
    place: Path, work: Mapping[str, Any], emission: Emission, count: int
) -> list[dict[str, dict[str, Any] | None]]:
    """Reserve the room for all weights; each rank's share, with what a journal has of it.

    No other rank may write yet: where a file system reserves nothing, the system writes zeros in the place of zeros.
    """
    begun = _begun(place, work)
    check_room(place / MODEL, emission.tensors, emission.shards.files)
    lay_out(place / MODEL, emission.shards.files, emission.tensors)
    return [{name: begun.get(name) for name in names} for names in shares(emission, begun, count)]


def _begun(place: Path, work: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The entries of all journals of a folder, of however many ranks, and of what was calibrated."""
    return entries_of_all(place.glob(f"{JOURNAL}*"), work)


def _check_seen(ranks: Ranks, place: Path) -> None:
    """That all ranks see the same folder."""
    if ranks.count == 1:
        return

    def write_token() -> str:
        path = place / f"seen-{secrets.token_hex(8)}"
        path.touch()
        return path.name

    path = place / ranks.shared(write_token)
    until = time.monotonic() + APPEARS
    while not path.exists():
        ranks.check()
        if time.monotonic() > until:
            raise CheckpointError(
                f"rank {ranks.rank} on {ranks.host} does not see {path}, which rank 0 has written. Remedy: an output on"
                " a file system that all ranks share, by one name"
            )
        time.sleep(0.1)
    ranks.gathered(None)
    if ranks.first:
        path.unlink()
