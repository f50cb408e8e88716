"""Files that are read: regular ones, of bounded size."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from lobcq_fx.errors import CheckpointError

FILE_LIMIT = 64 * 2**20
"""Bytes of a JSON file of a folder. The graphs of an 80-layer Llama take five million."""


def check_regular(path: Path) -> None:
    """That `path` is a file, not a pipe or a device, which would hang a reader or never end.

    Raises:
        CheckpointError: it is missing, unreadable or something else.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is not complete. Remedy: get it again") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is no regular file")


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a regular file of at most `limit` bytes.

    Raises:
        CheckpointError: it is missing, unreadable, no regular file, or larger.
    """
    check_regular(path)
    try:
        # Should a pipe have taken the file's place just now, opening it does not wait for its writer.
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if len(content) > limit:
        raise CheckpointError(f"{path} is larger than {limit / 2**20:.0f} MiB, which no such file is")
    return content


def json_object(content: bytes, path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        CheckpointError: it is no JSON, or no object.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value
