"""Single files that are written at once."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """A file of UTF-8 text, which is there as a whole or not at all; what was there before is replaced.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
