"""What was written into a folder: a digest of each file and tensor, so that no other bytes pass for them.

An index notices damage and mixtures, not malice: whoever can write the folder can write an index that fits. Compare
`FolderIndex.digest` with one that came another way where that matters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import blake3
import torch
from torch import Tensor

from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.files import json_object

INDEX = "lobcq.index.json"

PIECE = 16 * 2**20
"""Bytes that are read at a time where only their digest is wanted."""


@dataclass(frozen=True)
class TensorDigest:
    """Of one tensor. blake3: of its bytes, row by row."""

    dtype: str
    shape: tuple[int, ...]
    blake3: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TensorDigest:
        """Of JSON values, as `asdict` gives them."""
        return cls(str(values["dtype"]), tuple(map(int, values["shape"])), str(values["blake3"]))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}, blake3 {self.blake3[:12]}..."


@dataclass(frozen=True)
class FolderIndex:
    """Of one folder. files: blake3 by name. tensors: what the weights file holds, by name."""

    files: Mapping[str, str]
    tensors: Mapping[str, TensorDigest]

    @property
    def digest(self) -> str:
        """Of the folder: all files and tensors."""
        return digest_of(json.dumps(self._to_dict(), sort_keys=True, separators=(",", ":")).encode())

    def write(self, folder: Path) -> None:
        """Into `folder`, as the last of its files."""
        content = json.dumps({"blake3": self.digest, **self._to_dict()}, indent=1)
        (folder / INDEX).write_text(content + "\n", encoding="utf-8")

    def _to_dict(self) -> dict[str, Any]:
        return {"files": dict(self.files), "tensors": {name: asdict(one) for name, one in self.tensors.items()}}

    @classmethod
    def parse(cls, content: bytes, path: Path) -> FolderIndex:
        """What `write` has written.

        Raises:
            CheckpointError: it is damaged.
        """
        found = json_object(content, path)
        try:
            files = {str(name): str(digest) for name, digest in found["files"].items()}
            tensors = {str(name): TensorDigest.from_dict(one) for name, one in found["tensors"].items()}
            expected = str(found["blake3"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
        index = cls(files, tensors)
        if index.digest != expected:
            raise CheckpointError(f"{path} is damaged: its digests do not add up to its own")
        return index

    def check_file(self, path: Path, content: bytes) -> None:
        """That a file is the one that was written.

        Raises:
            CheckpointError: names the file.
        """
        if self.files.get(path.name) != digest_of(content):
            raise CheckpointError(
                f"{path} is not what was saved: it was damaged or edited since. Remedy: get the folder again"
            )


def described(tensor: Tensor) -> TensorDigest:
    """What the header of a weights file says of a tensor, no digest yet."""
    return TensorDigest(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), "")


def digested(tensor: Tensor) -> TensorDigest:
    """The same of a tensor on the CPU, with its digest."""
    return replace(described(tensor), blake3=digest_of(bytes_of(tensor)))


def bytes_of(tensor: Tensor) -> Any:
    """A tensor's content, row by row, as a buffer of bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorDigest]:
    """Of tensors on the CPU, in as many threads as there are cores."""

    def one(item: tuple[str, Tensor]) -> tuple[str, TensorDigest]:
        name, tensor = item
        return name, digested(tensor)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        largest_first = sorted(tensors.items(), key=lambda item: -item[1].nbytes)
        found = dict(threads.map(one, largest_first))
    return {name: found[name] for name in tensors}


def differing(expected: Mapping[str, TensorDigest], found: Mapping[str, TensorDigest]) -> list[str]:
    """What each tensor is that is not as expected, missing and unexpected ones included."""
    return [
        f"{name} is {found.get(name, 'missing')}; saved was {expected.get(name, 'none')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


def digest_of(content: Any) -> str:
    """BLAKE3 of bytes, in hex: cryptographic, and as fast as memory is read."""
    return blake3.blake3(content).hexdigest()


def digest_of_pieces(pieces: Iterable[Any]) -> str:
    """The same of bytes that come one after the other."""
    digest = blake3.blake3()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
