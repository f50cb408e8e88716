"""Replace a folder as a whole: either the old one stays, or the new one stands complete in its place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lobcq_fx.errors import CheckpointError


@contextmanager
def replace_folder(target: Path, is_ours: Callable[[Path], bool], parts: Container[str] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the block ends well it becomes `target`, else it is deleted, and so
    are the folders above it that there were not before.

    Files of an old folder that the block did not write again (a tokenizer, notes) are carried over, but for those that
    `parts` names, which belong to what was replaced.

    Raises:
        CheckpointError: `target` is a file, or holds something that `is_ours` does not recognise.
    """
    target = target.resolve()  # a link stays a link, and "." has a name
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file: name a folder")
    if target.is_dir() and any(target.iterdir()) and not is_ours(target):
        raise CheckpointError(f"{target} holds files that are not a quantized model: choose a new or empty folder")
    new = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield fresh
        _carry_over(target, fresh, parts)
        _sync(fresh)
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        with suppress(OSError):  # from the innermost out, up to one that holds something
            for folder in new:
                folder.rmdir()


def _carry_over(old: Path, fresh: Path, parts: Container[str]) -> None:
    for path in old.iterdir() if old.is_dir() else ():
        if path.name not in parts and not (fresh / path.name).exists():
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, fresh / path.name)


def _sync(folder: Path) -> None:
    """Flush every file, and give all the permissions that the user's umask grants (some writers make them private)."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _swap(fresh: Path, target: Path) -> None:
    """Two renames: POSIX has no portable exchange. Should the second fail, the first is undone."""
    if not target.exists():
        fresh.rename(target)
        return
    old = fresh.with_suffix(".old")
    target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
