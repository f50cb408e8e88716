"""What of a long work is done: a file of lines, each added once all that it speaks of is on the disk."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.atomic_folder import flush
from lobcq_fx.storage.index import digest_of
from lobcq_fx.storage.weights_file import naming, write_all

NAME = "name"


class Journal:
    """The journal of one work, new or as it was left.

    entries: what is known of each finished piece, by its name.
    """

    def __init__(self, path: Path, work: Mapping[str, Any]) -> None:
        """Open it.

        Args:
            path: the file.
            work: what the work is: the next one to open the file has to want the same. JSON-ready.

        Raises:
            CheckpointError: the file is of another work; names what differs.
            OSError: it cannot be read or written.
        """
        self._path, self._lock = path, threading.Lock()
        lines, size = _whole_lines(path)
        if len(lines) > 1:
            _check_same(path, lines[0], work)
        else:
            lines, size = [], 0
        self.entries = _named(lines)
        self._descriptor, self._size = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), size
        os.ftruncate(self._descriptor, size)
        if not lines:
            self._append(dict(work))
            flush(path.parent)

    def add(self, name: str, entry: Mapping[str, Any]) -> None:
        """Note that a piece is finished; safe to call from several threads.

        Raises:
            OSError: the disk is full, or fails.
        """
        with self._lock:
            self._append({**entry, NAME: name})
            self.entries[name] = {**entry, NAME: name}

    def close(self) -> None:
        """Let the file go."""
        os.close(self._descriptor)

    def _append(self, value: dict[str, Any]) -> None:
        text = json.dumps(value, separators=(",", ":"), sort_keys=True)
        line = f"{digest_of(text.encode())} {text}\n".encode()
        with naming(self._path):
            write_all(self._descriptor, memoryview(line), self._size)  # over what a failed call may have left
            os.fsync(self._descriptor)
        self._size += len(line)


def entries_of(path: Path, work: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The entries of a journal; none where there is no such file.

    Raises:
        CheckpointError: it has some, of another work than the one that is given.
    """
    lines, _ = _whole_lines(path)
    if work is not None and len(lines) > 1:
        _check_same(path, lines[0], work)
    return _named(lines)


def entries_of_all(paths: Iterable[Path], work: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The entries of several journals together; raises as `entries_of`."""
    return {name: entry for path in sorted(paths) for name, entry in entries_of(path, work).items()}


def _named(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {str(line[NAME]): line for line in lines[1:]}


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines up to the first that did not reach the disk as a whole, and how many bytes they are."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    lines, size = [], 0
    for line in content.splitlines(keepends=True):
        digest, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or digest.decode("ascii", "replace") != digest_of(text[:-1]):
            break
        lines.append(json.loads(text))
        size += len(line)
    return lines, size


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if differing:
        raise CheckpointError(
            f"{path.parent} was begun with other {', '.join(differing)}, and stays as it is. Remedy: call again as it"
            " was begun, with files of the same content and time (as `cp -p` copies them); or delete it, to begin anew"
        )
