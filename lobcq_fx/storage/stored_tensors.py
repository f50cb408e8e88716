"""The tensors of a folder: read, checked, and put into the module that graphs run on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx, nn

from lobcq_fx.errors import CheckpointError
from lobcq_fx.graph.attributes import register_attribute
from lobcq_fx.graph.graph_module import LobcqGraphModule, hold
from lobcq_fx.modules.packed_weight import PARTS
from lobcq_fx.storage.files import FILE_LIMIT, check_regular, read_bytes
from lobcq_fx.storage.index import PIECE, FolderIndex, bytes_of, described, differing, digests_of
from lobcq_fx.storage.rehearse import rehearse
from lobcq_fx.storage.shards import SHARD_INDEX, WEIGHTS, Shards, is_shard
from lobcq_fx.storage.unmapped import fill, places_in
from lobcq_fx.storage.validate import check_parameters, restore_packed_weights

WEIGHTS_OF_VERSION_1 = "model.safetensors"

ENTRY = "weights"
"""Key of a `quantization_config`: the file that leads to the tensors, where it is not the only one of them."""

SMALL = 4096
"""Bytes of tensors that are always compared with their digests: tensor scales and biases tell two saves apart."""

MAPPED = tuple(f".{part}" for part in PARTS if part != "tensor_scale")
"""Ends of the names of tensors that stay where a file is mapped until they are repacked."""

READ_AT_ONCE = 2**24
"""Bytes of tensors for which a file is opened anew: what was read of a mapping is resident while any look into it."""


def validated_root(tensors: Mapping[str, Tensor], graphs: list[fx.Graph], parameters: set[str]) -> fx.GraphModule:
    """`_root`, once its tensors and graphs are known to be such as can run."""
    check_parameters({name: tensor for name, tensor in tensors.items() if name in parameters})
    root = root_of(tensors, graphs, parameters)
    restore_packed_weights(root, graphs)
    rehearse(graphs, tensors)
    return root


def root_of(tensors: Mapping[str, Tensor], graphs: list[fx.Graph], parameters: set[str]) -> fx.GraphModule:
    """A module that runs the first graph, which has no code yet, with the tensors of all of them."""
    root = LobcqGraphModule(nn.Module(), fx.Graph(), class_name="LobcqGraph")
    for name in stored_names(graphs):
        tensor = tensors[name]
        is_parameter = name in parameters and tensor.is_floating_point()
        register_attribute(root, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    hold(root, graphs[0])
    return root


class StoredWeights:
    """A folder's tensors by name, mapped, whichever file has them."""

    def __init__(self, homes: Mapping[str, Any], paths: Mapping[str, Path]) -> None:
        """homes: each tensor's file, opened. paths: its path."""
        self._homes, self._paths = homes, paths

    def path(self, name: str) -> Path:
        """The file that has a tensor."""
        return self._paths[name]

    @property
    def names(self) -> frozenset[str]:
        """Of all."""
        return frozenset(self._homes)

    def get_tensor(self, name: str) -> Tensor:
        """One of them, mapped."""
        tensor: Tensor = self._homes[name].get_tensor(name)
        return tensor

    def shape(self, name: str) -> list[int]:
        """The shape of one."""
        return list(self._homes[name].get_slice(name).get_shape())


def stored_tensors(module: nn.Module, graphs: Sequence[fx.Graph]) -> dict[str, Tensor]:
    """Every tensor that graphs on stored weights refer to, by name; names that share memory get a copy each."""
    state = module.state_dict()
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in stored_names(graphs):
        tensor = state[name].cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return tensors


def stored_names(graphs: Sequence[fx.Graph]) -> list[str]:
    """What the graphs refer to, each once, in the order of the nodes."""
    return list(dict.fromkeys(str(node.target) for graph in graphs for node in graph.find_nodes(op="get_attr")))


def read_tensors(directory: Path, entry: str, graphs: Sequence[fx.Graph]) -> dict[str, Tensor]:
    """What the graphs refer to, from the files that `entry` leads to: copied, or where it is to be repacked mapped.

    Large tensors are read in as many threads as there are cores.
    """
    wanted = sorted(set(stored_names(graphs)))
    with open_weights(directory, entry) as weights:
        missing = sorted({*wanted} - weights.names)
        if missing:
            raise CheckpointError(f"{directory / entry} lacks {missing[0]} and {len(missing) - 1} more tensors")
        paths = {name: weights.path(name) for name in wanted}
    tensors: dict[str, Tensor] = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        reading = []
        for (path, mapped), waiting in _by_file(paths).items():
            while waiting:
                with _opened(path) as file:
                    places = {} if mapped else places_in(path)
                    room = READ_AT_ONCE
                    while waiting and room > 0:
                        name = waiting.popleft()
                        tensor = file.get_tensor(name)
                        room -= tensor.nbytes
                        if not mapped and tensor.nbytes > PIECE:
                            tensor = torch.empty_like(tensor)
                            reading.append(threads.submit(_read, path, places.get(name, (0, 0)), tensor))
                        elif not mapped:
                            tensor = tensor.clone()
                        tensors[name] = tensor
        for one in reading:
            one.result()
    return {name: tensors[name] for name in wanted}


def _read(path: Path, place: tuple[int, int], tensor: Tensor) -> None:
    """Fill a large tensor."""
    begin, size = place
    try:
        if size != tensor.nbytes:
            raise EOFError
        fill(bytes_of(tensor), path, begin)
    except EOFError:
        raise CheckpointError(f"{path} was changed while it was read. Remedy: load it again") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def _by_file(paths: Mapping[str, Path]) -> dict[tuple[Path, bool], deque[str]]:
    """Names by file, those that stay mapped for themselves: copies would keep them company."""
    found: dict[tuple[Path, bool], deque[str]] = {}
    for name, path in paths.items():
        found.setdefault((path, name.endswith(MAPPED)), deque()).append(name)
    return found


def check_tensors(path: Path, tensors: Mapping[str, Tensor], index: FolderIndex, *, verify: bool) -> None:
    """Against their digests; without `verify`, those of large ones are taken for right if dtypes and shapes are."""
    expected = {name: one for name, one in index.tensors.items() if name in tensors}
    read = {name: tensor for name, tensor in tensors.items() if verify or tensor.nbytes <= SMALL}
    found = digests_of(read) | {
        name: replace(described(tensor), blake3=expected[name].blake3)
        for name, tensor in tensors.items()
        if name not in read and name in expected
    }
    problems = differing(expected, found)
    if problems:
        more = f", and {len(problems) - 1} more tensors differ" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{path} is not what was saved: {problems[0]}{more}. Remedy: get the folder again; `lobcq verify` lists all"
        )


def entry_of(directory: Path, settings: Mapping[str, Any]) -> str:
    """The file that leads to a folder's tensors, of whichever version it is.

    Args:
        directory: the folder.
        settings: its `quantization_config`.

    Raises:
        CheckpointError: they name another file.
    """
    entry = check_entry(str(directory / "config.json"), settings.get(ENTRY, WEIGHTS))
    old = entry == WEIGHTS and not (directory / WEIGHTS).exists() and (directory / WEIGHTS_OF_VERSION_1).exists()
    return WEIGHTS_OF_VERSION_1 if old else entry


def check_entry(where: str, entry: Any) -> str:
    """That a name is that of a file that leads to a folder's tensors.

    Raises:
        CheckpointError: it is another; says `where` it was found.
    """
    if entry not in (WEIGHTS, SHARD_INDEX):
        raise CheckpointError(f"{where} has {ENTRY}={entry!r}, which is neither {WEIGHTS} nor {SHARD_INDEX}")
    return str(entry)


@contextmanager
def open_weights(directory: Path, entry: str) -> Iterator[StoredWeights]:
    """A folder's weights, mapped.

    Args:
        directory: the folder.
        entry: the file that leads to them: the only one, or the index of several.

    Raises:
        CheckpointError: they cannot be read, or are not of one save: files that the index does not name, tensors that
            are not where it has them.
    """
    sharded = entry == SHARD_INDEX
    index = Shards.parse(read_bytes(directory / entry, FILE_LIMIT), directory / entry).files if sharded else {}
    _check_no_others(directory, {*index, entry})
    with ExitStack() as stack:
        homes: dict[str, Any] = {}
        paths: dict[str, Path] = {}
        for name in index or (entry,):
            file = stack.enter_context(_opened(directory / name))
            held = set(file.keys())
            astray = sorted(held ^ set(index[name])) if sharded else []
            if astray:
                which = "has" if astray[0] in held else "lacks"
                raise CheckpointError(f"{directory / name} {which} {astray[0]}, against {entry}: get the folder again")
            homes |= dict.fromkeys(held, file)
            paths |= dict.fromkeys(held, directory / name)
        yield StoredWeights(homes, paths)


def _check_no_others(directory: Path, names: set[str]) -> None:
    """That no other save's weights are there: who reads by another rule would take those."""
    others = {*weights_of(directory), *({SHARD_INDEX} if (directory / SHARD_INDEX).exists() else ())} - names
    if others:
        path = directory / min(others)
        raise CheckpointError(f"{path} is not of the model that {directory} holds: get the folder again")


def weights_of(directory: Path) -> set[str]:
    """The names of a folder's files of weights, whatever else may be there."""
    return {path.name for path in directory.iterdir() if path.name == WEIGHTS or is_shard(path.name)}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, RuntimeError, SafetensorError) as error:  # torch, which maps it, raises the second
        raise CheckpointError(f"cannot read {path}: {error}") from None
