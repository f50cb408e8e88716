"""A quantized model as a folder.

config.json         the Hugging Face configuration (if any) with `quantization_config`: format version, settings
lobcq.safetensors   packed weights under the format's names, codebooks, and what stayed in float
graph.json          the FX graph and the calling convention, the same of other graphs on these tensors
inventory.json      every matmul and what became of it
tokenizer files, generation_config.json where the model has them
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CheckpointError
from lobcq_fx.graph.attributes import has_attribute, register_attribute
from lobcq_fx.graph.shared_tensors import SharingGraphModule
from lobcq_fx.inventory import Inventory
from lobcq_fx.modules.packed_weight import PARTS
from lobcq_fx.storage.atomic_folder import replace_folder
from lobcq_fx.storage.graph_json import graph_from_json, graph_to_json
from lobcq_fx.storage.validate import restore_packed_weights
from lobcq_fx.tracing.calling import CallingConvention
from lobcq_fx.tracing.trace import MAIN, TracedModel

QUANT_METHOD = "lobcq"
FORMAT_VERSION = 2
"""Raised whenever a folder written now could not be read by an older release."""

READABLE_VERSIONS = (1, 2)
"""Version 1 had the weights in `model.safetensors`, where transformers takes them for a float model's."""

WEIGHTS, WEIGHTS_OF_VERSION_1 = "lobcq.safetensors", "model.safetensors"

NOTICE = "a LO-BCQ model, which transformers does not open: call lobcq_fx.load(folder), of the package lobcq-fx"
"""In place of a file name, under the key that transformers reads one from: `from_pretrained` raises with this text."""

MAPPED = tuple(f".{part}" for part in PARTS if part != "tensor_scale")


Callings = Mapping[str, Callable[[dict[str, Any]], CallingConvention]]
"""What reads the calling convention of a graph, by the graph's name."""


@dataclass(frozen=True)
class StoredGraph:
    """A graph on stored weights, and how it is called, as it is written down."""

    graph: fx.Graph
    calling: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds of a model.

    root: has every tensor that a graph refers to. graphs: `MAIN` and others on the same tensors, by name.
    refused: why there is no such graph, by name. config: the Hugging Face configuration, None without one.
    """

    root: fx.GraphModule
    graphs: Mapping[str, StoredGraph]
    refused: Mapping[str, str]
    lobcq_config: LobcqConfig
    inventory: Inventory
    config: dict[str, Any] | None

    @property
    def calling(self) -> dict[str, Any]:
        """How the main graph is called."""
        return self.graphs[MAIN].calling

    def traced(self, callings: Callings) -> dict[str, TracedModel]:
        """Each graph that `callings` has a reader for, ready to run. Graphs of a kind unknown here are left out."""
        known = {name: one for name, one in self.graphs.items() if name in callings and _names_its_kind(name, one)}
        return {
            name: TracedModel(
                self.root if name == MAIN else SharingGraphModule(self.root, one.graph), callings[name](one.calling)
            )
            for name, one in known.items()
        }


def _names_its_kind(name: str, graph: StoredGraph) -> bool:
    return name in (MAIN, graph.calling["kind"])


@contextmanager
def saved_folder(
    checkpoint: Checkpoint, directory: Path, companions: Sequence[Any]
) -> Iterator[tuple[Path, Checkpoint]]:
    """Write a checkpoint beside `directory`, read it back, compare, and put it in place when the block ends well.

    Args:
        checkpoint: what to write.
        directory: new, empty, or a folder of ours, which is replaced as a whole.
        companions: what saves itself into the folder too: a tokenizer, a generation config.

    Yields:
        The folder that is not in place yet, and what it holds.
    """
    tensors = stored_tensors(checkpoint.root, [one.graph for one in checkpoint.graphs.values()])
    with replace_folder(directory, is_checkpoint) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        _write_json(folder / "config.json", _config(checkpoint))
        _write_json(folder / "graph.json", _graph(checkpoint))
        _write_json(folder / "inventory.json", checkpoint.inventory.to_dict())
        for one in companions:
            one.save_pretrained(folder)
        saved = load_checkpoint(folder)
        _compare(saved, tensors)
        yield folder, saved


def load_checkpoint(directory: Path) -> Checkpoint:
    """Read and validate a folder written by `saved_folder`.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    config = _read_json(directory / "config.json")
    settings = config.pop("quantization_config", None)
    config.pop("transformers_weights", None)
    _check_version(directory, settings)
    saved = _read_json(directory / "graph.json")
    try:
        graphs = {MAIN: StoredGraph(graph_from_json(saved["nodes"]), saved["calling"])}
        for name, entry in saved.get("variants", {}).items():
            graphs[name] = StoredGraph(graph_from_json(entry["nodes"]), entry["calling"])
        refused = {str(name): str(reason) for name, reason in saved.get("refused_variants", {}).items()}
        inventory = Inventory.from_dict(_read_json(directory / "inventory.json"))
        lobcq_config = LobcqConfig.from_dict(settings["lobcq_config"])
        parameters = set(saved["parameters"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory} is damaged: {type(error).__name__}: {error}") from None
    root = _root(directory, [one.graph for one in graphs.values()], parameters)
    return Checkpoint(root, graphs, refused, lobcq_config, inventory, config or None)


def _root(directory: Path, graphs: list[fx.Graph], parameters: set[str]) -> fx.GraphModule:
    """A module that runs the first graph, with the tensors of all of them."""
    module = nn.Module()
    for name, tensor in _read_tensors(directory, graphs).items():
        is_parameter = name in parameters and tensor.is_floating_point()
        register_attribute(module, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    root = fx.GraphModule(module, graphs[0], class_name="LobcqGraph")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not has_attribute(root, name):  # the line above copies what its own graph reads
            register_attribute(root, name, tensor)
    restore_packed_weights(root, graphs)  # packed weights are modules, which it would not copy
    return root


def is_checkpoint(directory: Path) -> bool:
    """Whether the folder looks like one of ours."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def weights_file(directory: Path) -> Path:
    """The file with a folder's weights, of whichever version it is."""
    old = directory / WEIGHTS_OF_VERSION_1
    return directory / WEIGHTS if (directory / WEIGHTS).exists() or not old.exists() else old


def stored_tensors(module: nn.Module, graphs: Sequence[fx.Graph]) -> dict[str, Tensor]:
    """Every tensor that graphs on stored weights refer to, by name; names that share memory get a copy each."""
    state = module.state_dict()
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in _names(graphs):
        tensor = state[name].cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return tensors


def _names(graphs: Sequence[fx.Graph]) -> list[str]:
    """What the graphs refer to, each once, in the order of the nodes."""
    return list(dict.fromkeys(str(node.target) for graph in graphs for node in graph.find_nodes(op="get_attr")))


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    quantization = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "lobcq_config": checkpoint.lobcq_config.to_dict(),
    }
    return {**(checkpoint.config or {}), "transformers_weights": NOTICE, "quantization_config": quantization}


def _graph(checkpoint: Checkpoint) -> dict[str, Any]:
    """Graphs besides the main one are called variants in the file."""
    main = checkpoint.graphs[MAIN]
    graph = {
        "calling": main.calling,
        "parameters": sorted(name for name, _ in checkpoint.root.named_parameters(remove_duplicate=False)),
        "nodes": graph_to_json(main.graph),
    }
    variants = {
        name: {"calling": one.calling, "nodes": graph_to_json(one.graph)}
        for name, one in checkpoint.graphs.items()
        if name != MAIN
    }
    rest = {"variants": variants, "refused_variants": dict(checkpoint.refused)}
    return graph | {name: value for name, value in rest.items() if value}


def _check_version(directory: Path, settings: Any) -> None:
    if not isinstance(settings, Mapping) or settings.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{directory} is not a quantized model of this package; write one with save_pretrained")
    version = settings.get("format_version")
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{directory} has format version {version}, this release reads {' and '.join(map(str, READABLE_VERSIONS))}:"
            " update lobcq-fx, or quantize the model again"
        )


def _read_tensors(directory: Path, graphs: Sequence[fx.Graph]) -> dict[str, Tensor]:
    wanted = set(_names(graphs))
    path = weights_file(directory)
    try:
        with safe_open(path, framework="pt") as file:
            missing = wanted - set(file.keys())
            if missing:
                raise CheckpointError(f"{path} lacks {sorted(missing)[0]} and {len(missing) - 1} more tensors")
            tensors = {name: file.get_tensor(name) for name in sorted(wanted)}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    # These look into the mapped file. Weights leave it when they are repacked; one tensor that stays would keep all of
    # it mapped, and resident.
    return {name: tensor if name.endswith(MAPPED) else tensor.clone() for name, tensor in tensors.items()}


def _compare(saved: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """What was read back against what was written, every byte."""
    restored = stored_tensors(saved.root, [one.graph for one in saved.graphs.values()])
    for name, tensor in tensors.items():
        if not torch.equal(_bytes(restored[name]), _bytes(tensor)):
            raise CheckpointError(
                f"{name} reads back different from what was written: the disk or its driver is failing"
            )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is no complete quantized model") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value
