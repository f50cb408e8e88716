"""The tensors of a folder: read, checked, and put into the module that graphs run on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, fx, nn

from lobcq_fx.errors import CheckpointError
from lobcq_fx.graph.attributes import has_attribute, register_attribute
from lobcq_fx.graph.graph_module import LobcqGraphModule
from lobcq_fx.modules.packed_weight import PARTS
from lobcq_fx.storage.files import check_regular
from lobcq_fx.storage.index import FolderIndex, described, differing, digests_of
from lobcq_fx.storage.rehearse import rehearse
from lobcq_fx.storage.validate import check_parameters, restore_packed_weights

WEIGHTS, WEIGHTS_OF_VERSION_1 = "lobcq.safetensors", "model.safetensors"

SMALL = 4096
"""Bytes of tensors that are always compared with their digests: tensor scales and biases tell two saves apart."""

MAPPED = tuple(f".{part}" for part in PARTS if part != "tensor_scale")
"""Ends of the names of tensors that stay where the file is mapped until they are repacked."""


def validated_root(tensors: Mapping[str, Tensor], graphs: list[fx.Graph], parameters: set[str]) -> fx.GraphModule:
    """`_root`, once its tensors and graphs are known to be such as can run."""
    # These look into the mapped file. Weights leave it when they are repacked; one tensor that stays would keep all of
    # it mapped, and resident.
    tensors = {name: tensor if name.endswith(MAPPED) else tensor.clone() for name, tensor in tensors.items()}
    check_parameters({name: tensor for name, tensor in tensors.items() if name in parameters})
    root = root_of(tensors, graphs, parameters)
    restore_packed_weights(root, graphs)
    rehearse(graphs, tensors)
    return root


def root_of(tensors: Mapping[str, Tensor], graphs: list[fx.Graph], parameters: set[str]) -> fx.GraphModule:
    """A module that runs the first graph, with the tensors of all of them."""
    module = nn.Module()
    for name, tensor in tensors.items():
        is_parameter = name in parameters and tensor.is_floating_point()
        register_attribute(module, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    root = LobcqGraphModule(module, graphs[0], class_name="LobcqGraph")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not has_attribute(root, name):  # the line above copies what its own graph reads
            register_attribute(root, name, tensor)
    return root


def weights_path(directory: Path) -> Path:
    """The file with a folder's weights, of whichever version it is."""
    old = directory / WEIGHTS_OF_VERSION_1
    return directory / WEIGHTS if (directory / WEIGHTS).exists() or not old.exists() else old


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


def read_tensors(directory: Path, graphs: Sequence[fx.Graph]) -> dict[str, Tensor]:
    """What the graphs refer to, mapped from the file."""
    wanted = set(stored_names(graphs))
    path = weights_path(directory)
    with open_weights(path) as file:
        missing = wanted - set(file.keys())
        if missing:
            raise CheckpointError(f"{path} lacks {sorted(missing)[0]} and {len(missing) - 1} more tensors")
        return {name: file.get_tensor(name) for name in sorted(wanted)}


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


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """A file of weights, mapped.

    Raises:
        CheckpointError: it cannot be read.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, RuntimeError, SafetensorError) as error:  # torch, which maps it, raises the second
        raise CheckpointError(f"cannot read {path}: {error}") from None
