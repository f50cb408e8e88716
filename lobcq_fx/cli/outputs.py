"""Where commands write: checked before the work starts, so that nobody waits an hour for a refusal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lobcq_fx.cli.failures import OutputError
from lobcq_fx.errors import CheckpointError


def check_output(
    path: Path,
    *,
    overwrite: bool,
    needed_bytes: int = 0,
    replaceable: Callable[[Path], bool] = Path.is_file,
) -> None:
    """Refuse a place that is taken or too small.

    Args:
        path: the file or folder that will be written.
        overwrite: an existing one may be replaced.
        needed_bytes: what will be written at least.
        replaceable: whether what is there may be replaced at all: a file, or a folder of the kind that is written.

    Raises:
        OutputError: something is there, its parent cannot be made, or the disk has less room.
    """
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not overwrite:
        raise OutputError(f"{path} exists: pass --overwrite to replace it, or choose another place with -o")
    if taken and not replaceable(path):
        raise OutputError(f"{path} holds something else, which stays: choose another place with -o")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {path.parent}: {error.strerror}") from None
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes:
        raise OutputError(
            f"{path.parent} has {free / 2**20:.1f} MiB free and at least {needed_bytes / 2**20:.1f} MiB are needed:"
            " free some space or write to another disk"
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around a save: a folder that is not ours or does not read back is a place we cannot write, not a bad input.

    Raises:
        OutputError: in place of the save's CheckpointError.
    """
    try:
        yield
    except CheckpointError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
