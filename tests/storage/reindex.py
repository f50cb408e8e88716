"""Folders that were changed by somebody who knows how they are checked."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from lobcq_fx.storage.index import FolderIndex, digest_of, digests_of
from lobcq_fx.storage.shards import WEIGHTS


def reindex(folder: Path) -> None:
    """Write an index of what is there now."""
    files = {name: digest_of((folder / name).read_bytes()) for name in ("config.json", "graph.json", "inventory.json")}
    tensors = load_file(folder / WEIGHTS)
    FolderIndex(files, digests_of(tensors)).write(folder)
