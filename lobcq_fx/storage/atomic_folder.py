"""Replace a folder as a whole: either the old one stays, or the new one stands complete in its place."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.exchange import exchange
from lobcq_fx.storage.terminations import terminations_unwind

if sys.platform != "win32":  # there, what a killed process leaves stays
    import fcntl

logger = logging.getLogger(__name__)

PARTIAL, OLD = ".partial", ".old"
"""Ends of the names of what is not yet in place, and of what was, for as long as it takes to put the new one there."""

UNFINISHED = ".unfinished"
"""The same of what is to be gone on with."""

MODEL = "model"
"""In a folder that is gone on with, the one that will be put in place."""


def none(name: str) -> bool:
    """No file's name is that of one that goes with what is replaced."""
    return False


@contextmanager
def replace_folder(
    target: Path, is_ours: Callable[[Path], bool], is_own: Callable[[str], bool] = none
) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the block ends well it becomes `target`, else it is deleted, and so
    are the folders above it that there were not before. SIGTERM and SIGHUP end it as an exception would.

    Whatever else an old folder holds (a tokenizer, notes, links, scripts) goes on in the new one as it is, but for what
    the block has written again.

    Args:
        target: a new folder, an empty one, or one of ours.
        is_ours: whether a folder may be replaced.
        is_own: whether a file, by its name, belongs to what is replaced.

    Raises:
        CheckpointError: `target` cannot be written, or is not ours.
        OSError: the disk is full, or fails.
    """
    check_target(target, is_ours)
    target = target.resolve()  # a link stays a link, and "." has a name
    new = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    with terminations_unwind(), ExitStack() as locks:
        with _locked(target.parent):  # no other save takes for dead what is not locked yet
            clear_leftovers(target)
            fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent))
            locks.enter_context(_locked(fresh))
        try:
            yield fresh
            _finish(fresh, target, is_own)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            with suppress(OSError):  # from the innermost out, up to one that holds something
                for folder in new:
                    folder.rmdir()


@contextmanager
def resumed_folder(
    target: Path, is_ours: Callable[[Path], bool], is_own: Callable[[str], bool], worth: Callable[[Path], bool]
) -> Iterator[Path]:
    """Yield a folder beside `target` that outlives a block that does not end well, and is there again the next time.

    In it, `MODEL` is the folder that becomes `target` when the block ends well; as in `replace_folder`, at once, with
    whatever else an old one holds. The rest says how far the block has come, and goes then. SIGTERM and SIGHUP end the
    block as an exception would.

    Args:
        target, is_ours, is_own: as in `replace_folder`.
        worth: whether the folder has anything to go on with; without, it goes when the block fails.

    Raises:
        CheckpointError: `target` cannot be written, is not ours, or another process is writing it like this.
        OSError: the disk is full, or fails.
    """
    check_target(target, is_ours)
    target = target.resolve()
    work = unfinished(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with terminations_unwind(), ExitStack() as locks:
        with _locked(target.parent):
            clear_leftovers(target)
            work.mkdir(mode=0o700, exist_ok=True)
            if not _lock_at_once(work, locks):
                raise CheckpointError(f"another process is writing {target}: wait for it, or choose another folder")
        try:
            (work / MODEL).mkdir(mode=0o700, exist_ok=True)
            yield work
            _finish(work / MODEL, target, is_own)
        except BaseException:
            if not worth(work):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def unfinished(target: Path) -> Path:
    """Where `resumed_folder` keeps what is not in place yet."""
    target = target.resolve()
    return target.parent / f".{target.name}{UNFINISHED}"


def _finish(fresh: Path, target: Path, is_own: Callable[[str], bool]) -> None:
    """Put a folder that is complete in place."""
    _give_permissions(fresh)
    if target.is_dir():
        _keep_the_rest(target, fresh, is_own)
    _sync(fresh)
    with _locked(target.parent):  # no other save takes a model that makes way for abandoned
        _put_in_place(fresh, target)


def check_target(target: Path, is_ours: Callable[[Path], bool], source: Path | None = None) -> Path:
    """Refuse, before long work, what could not be written after it.

    Args:
        target: the folder to write.
        is_ours: whether a folder may be replaced.
        source: a folder that is read from, if any.

    Returns:
        The folder above it that there is already.

    Raises:
        CheckpointError: says what is in the way.
    """
    if target.is_symlink() and not target.exists():
        raise CheckpointError(f"{target} is a link to {target.readlink()}, which is not there: name a folder")
    resolved = target.resolve()
    if resolved.exists() and not resolved.is_dir():
        raise CheckpointError(f"{target} is a file: name a folder")
    if resolved.is_dir() and any(resolved.iterdir()) and not is_ours(resolved):
        raise CheckpointError(f"{target} holds files that are not a quantized model: choose a new or empty folder")
    if source is not None and source.resolve() in (resolved, *resolved.parents):
        raise CheckpointError(f"{target} is in {source}, which is read from: choose a folder outside of it")
    parent = next(folder for folder in resolved.parents if folder.exists())
    try:
        with _locked(parent):  # a save to `target` that starts now would clear it up
            Path(tempfile.mkdtemp(prefix=f".{resolved.name}.", suffix=PARTIAL, dir=parent)).rmdir()
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror}: {parent}") from None
    return parent


def leftovers(target: Path) -> list[Path]:
    """What saves to `target` that were killed have left beside it."""
    target = target.resolve()
    if not target.parent.is_dir():
        return []
    # mkdtemp puts no dot in the middle: with one it would be of another target, whose name begins like this one.
    name = re.compile(rf"\.{re.escape(target.name)}\.[^.]+({re.escape(PARTIAL)}|{re.escape(OLD)})")
    found = [one for one in target.parent.iterdir() if name.fullmatch(one.name)]
    return sorted(one for one in found if one.is_dir() and not one.is_symlink())


def clear_leftovers(target: Path) -> None:
    """Delete them, but for those of saves that are still running; a model that had to make way comes back."""
    for folder in leftovers(target):
        if folder.suffix == OLD and not target.exists():
            folder.rename(target)
            logger.warning("%s was moved aside by a save that was killed: it is back", target)
        elif not _is_locked(folder):
            shutil.rmtree(folder, ignore_errors=True)
            logger.info("deleted %s, left by a save that was killed", folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within, `_is_locked` is true of it, in every process; the end of this one ends that too."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock_at_once(folder: Path, locks: ExitStack) -> bool:
    """Lock a folder until `locks` are let go; False where another process has it."""
    if sys.platform == "win32":
        return True
    if _is_locked(folder):
        return False
    locks.enter_context(_locked(folder))
    return True


def _is_locked(folder: Path) -> bool:
    if sys.platform == "win32":
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _give_permissions(folder: Path) -> None:
    """All that the user's umask grants: some writers make their files private."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _keep_the_rest(old: Path, fresh: Path, is_own: Callable[[str], bool]) -> None:
    """Hard links: the same files, with their modes and times, under a second name until the old folder goes."""
    for entry in os.scandir(old):
        if not is_own(entry.name) and not os.path.lexists(fresh / entry.name):
            _link(entry, fresh / entry.name)
    shutil.copystat(old, fresh)


def _link(entry: os.DirEntry[str], place: Path) -> None:
    if entry.is_dir(follow_symlinks=False):
        place.mkdir()
        for inner in os.scandir(entry.path):
            _link(inner, place / inner.name)
        shutil.copystat(entry.path, place)
    else:
        try:
            os.link(entry.path, place, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(entry.path, place, follow_symlinks=False)


def _sync(folder: Path) -> None:
    """Flush every file and folder of it to the disk."""
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        with suppress(PermissionError):  # of somebody else's files there is nothing new
            flush(path)


def flush(path: Path) -> None:
    """What is written to a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(fresh: Path, target: Path) -> None:
    """At once where the system can exchange two names; else by two renames, of which the first can be undone."""
    if not target.exists():
        fresh.rename(target)
    elif not exchange(fresh, target):
        old = fresh.with_suffix(OLD)
        target.rename(old)
        try:
            fresh.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    flush(target.parent)
