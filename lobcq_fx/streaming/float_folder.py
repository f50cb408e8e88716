"""A folder of a float model whose weights are safetensors, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.files import check_regular, json_object, read_bytes
from lobcq_fx.storage.index import PIECE, bytes_of, digest_of, digest_of_pieces
from lobcq_fx.storage.unmapped import fill, header_of, places_in
from lobcq_fx.storage.weights_file import DTYPES

SINGLE, SHARDED = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

INDEX_LIMIT = 256 * 2**20
"""Bytes of the file that says which shard has which tensor."""

_NOT_READ = ("uint16", "uint32", "uint64", "complex64")
_DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for name, code in DTYPES.items() if name not in _NOT_READ}


def _new_memory(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu")


class FloatFolder:
    """The tensors of a folder, as they are stored there.

    path: the folder. config: what its config.json holds.
    """

    def __init__(self, path: Path) -> None:
        """Open every file of weights, none of whose tensors is read yet.

        Raises:
            CheckpointError: there is no model, or none in safetensors, or a file or tensor is missing or not whole.
        """
        self.path = path
        self.config = json_object(read_bytes(path / CONFIG, INDEX_LIMIT), path / CONFIG)
        self._files: dict[Path, Any] = {}
        self._homes: dict[str, Path] = {}
        self._begins: dict[str, int] = {}
        expected = _weight_files(path)
        for file in expected:
            self._files[file] = _opened(file)
            # In the order of the file, in which transformers looks for the first of floats.
            self._homes |= dict.fromkeys(self._files[file].offset_keys(), file)
            self._begins |= {name: begin for name, (begin, _) in places_in(file).items()}
        for file, names in expected.items():
            _check_there(file, names - self._homes.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def dtype(self, name: str) -> torch.dtype:
        """The type that a tensor is stored in.

        Raises:
            CheckpointError: one that holds no plain numbers.
        """
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            raise CheckpointError(f"{name} of {self._homes[name]} is stored as {stored}: pass a float model's folder")
        return _DTYPES[stored]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        return self.dtype(name).itemsize * torch.Size(self.shape(name)).numel()

    def read(self, name: str, memory: Callable[[int], Tensor] = _new_memory) -> Tensor:
        """A tensor, in memory of its own.

        memory: gives as many bytes as it is called for, uint8, of any content.

        Raises:
            CheckpointError: its file cannot be read.
        """
        content = memory(self.size(name))
        self._fill(name, bytes_of(content))
        return content.view(self.dtype(name)).view(self.shape(name))

    def without_content(self, name: str) -> Tensor:
        """A tensor of the same dtype and shape, in no memory of its own."""
        return torch.zeros((), dtype=self.dtype(name), device="cpu").expand(self.shape(name))

    def digest(self, name: str) -> str:
        """BLAKE3 of a tensor's content.

        Raises:
            CheckpointError: its file cannot be read.
        """
        size, piece = self.size(name), memoryview(bytearray(PIECE))

        def pieces() -> Iterator[memoryview]:
            for at in range(0, size, PIECE):
                content = piece[: size - at]
                self._fill(name, content, at)
                yield content

        return digest_of_pieces(pieces())

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether the folder is the same later: of each file of weights its size, its time and a digest of
        its header; of the configurations a digest.

        Raises:
            CheckpointError: a file cannot be read.
        """
        found: dict[str, Any] = {file.name: _state_of(file) for file in self._files}
        for name in (CONFIG, GENERATION_CONFIG):
            with suppress(FileNotFoundError):
                found[name] = digest_of((self.path / name).read_bytes())
        return found

    def _slice(self, name: str) -> Any:
        return self._files[self._homes[name]].get_slice(name)

    def _fill(self, name: str, content: memoryview, at: int = 0) -> None:
        """Fill a buffer with what a tensor holds from a byte on."""
        path = self._homes[name]
        try:
            fill(content, path, self._begins[name] + at)
        except (OSError, EOFError) as error:
            raise CheckpointError(
                f"cannot read {name} of {path}: {error}. Remedy: copy or download the file again"
            ) from None


def has_safetensors(path: Path) -> bool:
    """Whether a folder's weights are safetensors under the names that transformers reads."""
    return (path / SINGLE).is_file() or (path / SHARDED).is_file()


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of the files that two fingerprints differ in."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _weight_files(path: Path) -> dict[Path, set[str]]:
    """Each file, in their order, and which tensors the index has in it: none where there is no index."""
    if (path / SINGLE).is_file():
        return {path / SINGLE: set()}
    if (path / SHARDED).is_file():
        index = json_object(read_bytes(path / SHARDED, INDEX_LIMIT), path / SHARDED)
        found: dict[str, set[str]] = {}
        try:
            for tensor, name in index["weight_map"].items():
                found.setdefault(str(name), set()).add(tensor)
        except (AttributeError, KeyError, TypeError):
            raise CheckpointError(f"{path / SHARDED} has no weight_map: copy or download the file again") from None
        if not found or any(Path(name).name != name for name in found):
            raise CheckpointError(f"{path / SHARDED} names no files beside itself: copy or download the file again")
        return {path / name: found[name] for name in sorted(found)}
    others = sorted(
        file.name for pattern in ("*.bin", "*.safetensors", "*.gguf", "*.pt") for file in path.glob(pattern)
    )
    raise CheckpointError(
        f"{path} has neither {SINGLE} nor {SHARDED}, but {', '.join(others[:3]) or 'no weights'}: only safetensors are"
        " read tensor by tensor. Remedy: load the model, and call lobcq_fx.quantize(model).save_pretrained(folder); or"
        " save it as safetensors first, with model.save_pretrained(folder)"
    )


def _opened(file: Path) -> Any:
    check_regular(file)
    try:
        # Not mapped: this is for names, dtypes and shapes alone.
        return safe_open(file, framework="pt", backend="pread")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not whole, copy or download it again: {error}") from None


def _check_there(file: Path, missing: set[str]) -> None:
    """Else transformers would make it up."""
    if missing:
        raise CheckpointError(
            f"{file} lacks {min(missing)}, and {len(missing) - 1} more tensors, which {SHARDED} has in it: copy or"
            " download both again"
        )


def _state_of(file: Path) -> list[Any]:
    _, header = header_of(file)
    try:
        found = file.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None
    return [found.st_size, found.st_mtime_ns, digest_of(header)]
