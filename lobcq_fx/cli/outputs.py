"""Where commands write: checked before the work starts, so that nobody waits an hour for a refusal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lobcq_fx.cli.failures import OutputError
from lobcq_fx.cli.json_text import json_text
from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.atomic_file import write_whole


def check_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a place for a file that is taken, or whose folder cannot be made.

    Raises:
        OutputError: says what is there.
    """
    _check_free(path, path.exists(), overwrite=overwrite)
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} holds something else, which stays: choose another place with -o")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {path.parent}: {error.strerror}") from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A file of one JSON object, which is there as a whole or not at all."""
    write_whole(path, json_text(values) + "\n")


def check_folder(
    path: Path, *, overwrite: bool, needed_bytes: int, replaceable: Callable[[Path], bool], source: Path
) -> None:
    """Refuse a place for a folder that is taken, cannot be written or is too small.

    Args:
        path: the folder that will be written.
        overwrite: an existing one may be replaced.
        needed_bytes: what will be written at least.
        replaceable: whether what is there may be replaced at all: a folder of the kind that is written.
        source: the folder that is read, which must not hold it.

    Raises:
        OutputError: says what is in the way, or how much room there is.
    """
    from rich.filesize import decimal

    from lobcq_fx.storage.atomic_folder import check_target

    _check_free(path, path.exists() and not (path.is_dir() and not any(path.iterdir())), overwrite=overwrite)
    with writing(path):
        disk = check_target(path, replaceable, source)
    free = shutil.disk_usage(disk).free
    if free < needed_bytes:
        raise OutputError(
            f"{disk} has {decimal(free)} free and at least {decimal(needed_bytes)} are needed:"
            " free some space or write to another disk"
        )


def _check_free(path: Path, taken: bool, *, overwrite: bool) -> None:
    if taken and not overwrite:
        raise OutputError(f"{path} exists: pass --overwrite to replace it, or choose another place with -o")


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
