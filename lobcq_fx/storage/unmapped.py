"""Safetensors files read without a mapping: what is copied out of a mapping is resident as long as it is open."""

from __future__ import annotations

from pathlib import Path

from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.files import json_object
from lobcq_fx.storage.index import PIECE

LONGEST_HEADER = 100_000_000
"""Bytes, as the library that reads the files has it."""


def header_of(path: Path) -> tuple[int, bytes]:
    """The length that a file says its header has, and the header.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return length, file.read(min(length, LONGEST_HEADER))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def places_in(path: Path) -> dict[str, tuple[int, int]]:
    """Of each tensor its first byte in a file, and how many it has.

    The header is taken for right: open the file by its library first.

    Raises:
        CheckpointError: it cannot be read.
    """
    length, header = header_of(path)
    offsets = {name: one["data_offsets"] for name, one in json_object(header, path).items() if name != "__metadata__"}
    return {name: (8 + length + begin, end - begin) for name, (begin, end) in offsets.items()}


def fill(content: memoryview, path: Path, begin: int) -> None:
    """Fill a buffer with what a file holds from a byte on.

    Raises:
        EOFError: the file ends before the buffer does.
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while content:
            count = file.readinto(content[:PIECE])
            if not count:
                raise EOFError("it ends before the tensor does")
            content = content[count:]
