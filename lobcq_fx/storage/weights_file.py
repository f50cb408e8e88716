"""A safetensors file whose tensors come in any order: each is written to the place that the header has for it.

The bytes are those that `safetensors.torch.save_file` writes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.storage.index import PIECE, TensorDigest, bytes_of, digest_of_pieces

if sys.platform != "win32":
    import fcntl

DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "int16": "I16",
    "uint16": "U16", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint32": "U32", "float32": "F32",
    "complex64": "C64", "float64": "F64", "int64": "I64", "uint64": "U64",
}  # fmt: skip
"""torch's names and the format's, in the order of the format: tensors of the last ones come first in a file."""

_ALIGNMENT = 8


class WeightsFile:
    """The places of tensors in a file of a known size."""

    def __init__(self, path: Path, descriptor: int, tensors: Mapping[str, TensorDigest]) -> None:
        self._path, self._descriptor = path, descriptor
        self._header, self._places = _laid_out(tensors)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor, on the CPU, in its place.

        Raises:
            OSError: the disk is full, or fails.
        """
        begin, end = self._places[name]
        content = memoryview(bytes_of(tensor)).cast("B")
        assert len(content) == end - begin, f"{name} has {len(content)} bytes, not {end - begin}"
        with naming(self._path), _locked(self._descriptor, begin, end):
            write_all(self._descriptor, content, begin)

    def digest(self, name: str) -> str:
        """BLAKE3 of what is in a tensor's place, read piece by piece.

        Raises:
            OSError: the disk fails.
        """
        begin, end = self._places[name]
        return digest_of_pieces(os.pread(self._descriptor, min(PIECE, end - at), at) for at in range(begin, end, PIECE))

    def sync(self) -> None:
        """Flush what was written to the disk."""
        with naming(self._path):
            os.fsync(self._descriptor)

    def lay_out(self) -> None:
        """Write the header and reserve the room for all tensors; those that are there already stay.

        Raises:
            OSError: the disk is full, or fails.
        """
        size = max((end for _, end in self._places.values()), default=len(self._header))
        with naming(self._path):
            _reserve(self._descriptor, size)
            write_all(self._descriptor, memoryview(self._header), 0)


class WeightsFiles:
    """The same of several files, each of which has some of the tensors."""

    def __init__(self, homes: Mapping[str, WeightsFile]) -> None:
        """homes: each tensor's file."""
        self._homes = homes

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor, on the CPU, in its place; raises as `WeightsFile.write`."""
        self._homes[name].write(name, tensor)

    def digest(self, name: str) -> str:
        """BLAKE3 of what is in a tensor's place; raises as `WeightsFile.digest`."""
        return self._homes[name].digest(name)

    def sync(self, names: Iterable[str]) -> None:
        """Flush what was written of these tensors to the disk."""
        for file in {self._homes[name] for name in names}:
            file.sync()


def lay_out(folder: Path, files: Mapping[str, Iterable[str]], tensors: Mapping[str, TensorDigest]) -> None:
    """Make the files of a folder, with the room for all tensors; those that are there already stay.

    Args:
        folder: where they are.
        files: the names of each file's tensors, by its name.
        tensors: their dtypes and shapes.

    Raises:
        OSError: there is no room for them, or the disk fails.
    """
    for file, names in files.items():
        with weights_file(folder / file, {name: tensors[name] for name in names}):
            pass


@contextmanager
def weights_files(
    folder: Path, files: Mapping[str, Iterable[str]], tensors: Mapping[str, TensorDigest]
) -> Iterator[WeightsFiles]:
    """Open files that were laid out; several processes may, if each writes tensors of its own.

    Raises:
        OSError: the disk fails.
    """
    with ExitStack() as stack:
        homes: dict[str, WeightsFile] = {}
        for file, names in files.items():
            held = {name: tensors[name] for name in names}
            homes |= dict.fromkeys(held, stack.enter_context(_opened(folder / file, held)))
        yield WeightsFiles(homes)


@contextmanager
def weights_file(path: Path, tensors: Mapping[str, TensorDigest]) -> Iterator[WeightsFile]:
    """Open a file for tensors of these dtypes and shapes, new or as it was left.

    Raises:
        OSError: there is no room for it, or the disk fails.
    """
    with _opened(path, tensors, os.O_CREAT) as file:
        file.lay_out()
        yield file


@contextmanager
def _opened(path: Path, tensors: Mapping[str, TensorDigest], flags: int = 0) -> Iterator[WeightsFile]:
    descriptor = os.open(path, os.O_RDWR | flags | getattr(os, "O_BINARY", 0), 0o666)
    try:
        yield WeightsFile(path, descriptor, tensors)
    finally:
        os.close(descriptor)


def check_room(folder: Path, tensors: Mapping[str, TensorDigest], there: Iterable[str] = ()) -> None:
    """That the disk has room for tensors.

    Args:
        folder: where they will be written.
        tensors: what they are.
        there: names of files in it that may have room for some of them already.

    Raises:
        OSError: it has not.
    """
    begun = [folder / name for name in there if (folder / name).exists()]
    needed = sum(size_of(one) for one in tensors.values()) - sum(file.stat().st_blocks * 512 for file in begun)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free", str(folder))


def _laid_out(tensors: Mapping[str, TensorDigest]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header, and where each tensor begins and ends."""
    order = list(DTYPES)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name.encode()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, offsets = 0, {}
    for name in names:
        one = tensors[name]
        offsets[name] = (offset, offset + size_of(one))
        header[name] = {"dtype": DTYPES[one.dtype], "shape": list(one.shape), "data_offsets": list(offsets[name])}
        offset += size_of(one)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    places = {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}
    return len(text).to_bytes(8, "little") + text, places


def size_of(one: TensorDigest) -> int:
    """Bytes of a tensor."""
    dtype: torch.dtype = getattr(torch, one.dtype)
    return torch.Size(one.shape).numel() * dtype.itemsize


def _reserve(descriptor: int, size: int) -> None:
    """So that the disk is full now, or not at all."""
    os.ftruncate(descriptor, size)
    if sys.platform == "linux" and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of file systems that reserve nothing
                raise


def write_all(descriptor: int, content: memoryview, at: int) -> None:
    """Write all of a buffer to a place in a file."""
    while content:
        written = os.pwrite(descriptor, content[: 1 << 30], at)
        content, at = content[written:], at + written


@contextmanager
def _locked(descriptor: int, begin: int, end: int) -> Iterator[None]:
    """Lock a part of a file, of which other processes write other parts.

    So asks nfs(5): without, a machine may write the whole of a page that it has read a part of.
    """
    if sys.platform == "win32" or begin == end:
        yield
        return
    with suppress(OSError):  # some file systems have no locks
        fcntl.lockf(descriptor, fcntl.LOCK_EX, end - begin, begin)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.lockf(descriptor, fcntl.LOCK_UN, end - begin, begin)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of calls that know a file by its number alone say which it is."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
