"""A quantized model as a folder.

config.json         the Hugging Face configuration (if any) with `quantization_config`: format version, settings
lobcq.safetensors   packed weights under the format's names, codebooks, and what stayed in float; where that is too
                    large, lobcq-00001-of-00002.safetensors and so on, and lobcq.safetensors.index.json
graph.json          the FX graph and the calling convention, the same of other graphs on these tensors
inventory.json      every matmul and what became of it
lobcq.index.json    a digest of each of these files, and of each tensor
README.md           what the model is, for people
tokenizer files, generation_config.json where the model has them
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CheckpointError
from lobcq_fx.graph.shared_tensors import SharingGraphModule
from lobcq_fx.inventory import Inventory
from lobcq_fx.storage.atomic_folder import replace_folder
from lobcq_fx.storage.files import FILE_LIMIT, json_object, read_bytes
from lobcq_fx.storage.graph_json import graph_from_json, graph_to_json
from lobcq_fx.storage.index import INDEX, FolderIndex, TensorDigest, described, differing, digest_of, digests_of
from lobcq_fx.storage.rehearse import META, rehearse
from lobcq_fx.storage.shards import SHARD_INDEX, WEIGHTS, Shards, is_shard
from lobcq_fx.storage.stored_tensors import (
    ENTRY,
    WEIGHTS_OF_VERSION_1,
    check_tensors,
    entry_of,
    open_weights,
    read_tensors,
    root_of,
    stored_names,
    stored_tensors,
    validated_root,
)
from lobcq_fx.storage.weights_file import check_room, lay_out, weights_files
from lobcq_fx.tracing.calling import CallingConvention
from lobcq_fx.tracing.trace import MAIN, TracedModel

logger = logging.getLogger(__name__)

QUANT_METHOD = "lobcq"
FORMAT_VERSION = 2
"""Raised whenever a folder written now could not be read by an older release."""

READABLE_VERSIONS = (1, 2)
"""Version 1 had the weights in `model.safetensors`, where transformers takes them for a float model's."""

NOTICE_START = "a LO-BCQ model"
NOTICE = (
    f"{NOTICE_START}, which transformers does not open by itself: import lobcq_fx first, or call"
    " lobcq_fx.load(folder), of the package lobcq-fx"
)
"""In place of a file name, under the key that transformers reads one from: `from_pretrained` raises with this text."""

LAYERS = "layers"
"""Key of a `quantization_config` whose folder has a model's modules, and no graph: transformers wrote it."""

INVENTORY = "inventory.json"
DESCRIPTIONS = ("config.json", "graph.json", INVENTORY)

FILES = (*DESCRIPTIONS, WEIGHTS, INDEX)
"""Of a folder whose weights are one file."""

TRIES = 5
"""Times a folder may be replaced while it is read."""


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
        return {name: self._traced(name, one, callings[name](one.calling)) for name, one in known.items()}

    def _traced(self, name: str, one: StoredGraph, calling: CallingConvention) -> TracedModel:
        (output,) = one.graph.find_nodes(op="output")
        results = output.args[0] if isinstance(output.args[0], (tuple, list)) else ()
        found = len(one.graph.find_nodes(op="placeholder")), len(results)
        if found != calling.arity:
            raise CheckpointError(
                f"graph.json: the graph {name!r} has {found[0]} inputs and {found[1]} outputs; it is called for"
                f" {calling.arity[0]} and {calling.arity[1]}"
            )
        return TracedModel(self.root if name == MAIN else SharingGraphModule(self.root, one.graph), calling)


def _names_its_kind(name: str, graph: StoredGraph) -> bool:
    return name in (MAIN, graph.calling["kind"])


@contextmanager
def saved_folder(
    checkpoint: Checkpoint, directory: Path, companions: Sequence[Any], max_shard_size: int | str | None = None
) -> Iterator[tuple[Path, Checkpoint]]:
    """Write a checkpoint beside `directory`, read it back, compare, and put it in place when the block ends well.

    Args:
        checkpoint: what to write.
        directory: new, empty, or a folder of ours, which is replaced as a whole.
        companions: what saves itself into the folder too: a tokenizer, a generation config.
        max_shard_size: of a file of weights, as `Shards.split` takes it.

    Yields:
        The folder that is not in place yet, and what it holds.

    Raises:
        ConfigError: `max_shard_size` is no size.
    """
    tensors = stored_tensors(checkpoint.root, [one.graph for one in checkpoint.graphs.values()])
    shards = Shards.split({name: described(tensor) for name, tensor in tensors.items()}, max_shard_size)
    with replace_folder(directory, is_checkpoint, is_own) as folder:
        digests = digests_of(tensors)
        check_room(folder, digests)
        lay_out(folder, shards.files, digests)
        with weights_files(folder, shards.files, digests) as files:
            for name, tensor in tensors.items():
                files.write(name, tensor)
        write_descriptions(folder, descriptions(checkpoint, shards, digests), companions, digests)
        yield folder, load_checkpoint(folder)


def descriptions(checkpoint: Checkpoint, shards: Shards, tensors: Mapping[str, TensorDigest]) -> dict[str, bytes]:
    """What stands beside the weights, by the names of the files."""
    values = (_config(checkpoint, shards), _graph(checkpoint), checkpoint.inventory.to_dict())
    contents = {name: json_bytes(value) for name, value in zip(DESCRIPTIONS, values, strict=True)}
    return contents | shards.index(tensors)


def write_descriptions(
    folder: Path, contents: Mapping[str, bytes], companions: Sequence[Any], tensors: Mapping[str, TensorDigest]
) -> None:
    """Write all but the weights; the index, which has the digests of the rest, comes last."""
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for one in companions:
        one.save_pretrained(folder)
    FolderIndex({name: digest_of(content) for name, content in contents.items()}, tensors).write(folder)


def load_checkpoint(directory: Path, *, verify: bool = True) -> Checkpoint:
    """Read and validate a folder written by `saved_folder`; one that is replaced meanwhile is read again.

    Args:
        directory: the folder.
        verify: compare every tensor with its digest. The small ones, and the other files, are always compared, so that
            a folder is always of one save.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    for _ in range(TRIES):
        before = _generation(directory)
        try:
            checkpoint = _load(directory, verify=verify)
        except CheckpointError:
            if _generation(directory) == before:
                raise
        else:
            if _generation(directory) == before:
                return checkpoint
    raise CheckpointError(f"{directory} was replaced {TRIES} times while it was read: load it when that is over")


def verify_folder(directory: Path) -> tuple[FolderIndex, list[str]]:
    """The index of a folder, and all that is not as it says, whether or not it can be loaded.

    Raises:
        CheckpointError: the folder has no index, or a damaged one.
    """
    index = FolderIndex.parse(read_bytes(directory / INDEX, FILE_LIMIT), directory / INDEX)
    problems, entry = [], SHARD_INDEX if SHARD_INDEX in index.files else WEIGHTS
    for name in (*DESCRIPTIONS, *({SHARD_INDEX} & index.files.keys())):
        try:
            index.check_file(directory / name, read_bytes(directory / name, FILE_LIMIT))
        except CheckpointError as error:
            problems.append(str(error))
    try:
        with open_weights(directory, entry) as weights:
            found = digests_of({name: weights.get_tensor(name) for name in sorted(weights.names)})
    except CheckpointError as error:
        return index, [*problems, str(error)]
    return index, problems + differing(index.tensors, found)


def _generation(directory: Path) -> tuple[int, int] | None:
    """Which folder stands there: a save replaces it as a whole."""
    try:
        found = directory.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@dataclass(frozen=True)
class _Described:
    """What the files beside the weights say.

    entry: the file that leads to the tensors. parameters: names of those that are parameters.
    """

    graphs: Mapping[str, StoredGraph]
    refused: Mapping[str, str]
    lobcq_config: LobcqConfig
    inventory: Inventory
    config: dict[str, Any] | None
    entry: str
    parameters: set[str]
    index: FolderIndex | None

    @property
    def fx_graphs(self) -> list[fx.Graph]:
        return [one.graph for one in self.graphs.values()]

    def checkpoint(self, root: fx.GraphModule) -> Checkpoint:
        return Checkpoint(root, self.graphs, self.refused, self.lobcq_config, self.inventory, self.config)


def check_written(directory: Path, digest: Callable[[str], str]) -> Checkpoint:
    """Read a folder that was written just now back, but for its weights, and check those against the index.

    Args:
        directory: the folder.
        digest: BLAKE3 of a tensor, by its name, as its file has it.

    Returns:
        What the folder holds, its tensors without content: for those who read the rest.

    Raises:
        CheckpointError: names the file or tensor, and what is wrong with it.
    """
    found = _described(directory)
    assert found.index is not None
    tensors = {}
    with open_weights(directory, found.entry) as weights:
        for name in stored_names(found.fx_graphs):
            dtype = getattr(torch, found.index.tensors[name].dtype)
            tensors[name] = torch.empty(weights.shape(name), dtype=dtype, device=META)
    problems = differing(found.index.tensors, {n: replace(described(t), blake3=digest(n)) for n, t in tensors.items()})
    if problems:
        raise CheckpointError(f"{directory / found.entry} does not read back as it was written: {problems[0]}")
    rehearse(found.fx_graphs, tensors)
    return found.checkpoint(root_of(tensors, found.fx_graphs, found.parameters))


def _load(directory: Path, *, verify: bool) -> Checkpoint:
    found = _described(directory)
    tensors = read_tensors(directory, found.entry, found.fx_graphs)
    if found.index is not None:
        check_tensors(directory / found.entry, tensors, found.index, verify=verify)
    return found.checkpoint(validated_root(tensors, found.fx_graphs, found.parameters))


def _described(directory: Path) -> _Described:
    content = read_bytes(directory / "config.json", FILE_LIMIT)
    config = json_object(content, directory / "config.json")
    settings = config.pop("quantization_config", None)
    config.pop("transformers_weights", None)
    version = check_version(str(directory), settings)
    if LAYERS in settings:
        raise CheckpointError(
            f"{directory} has a LO-BCQ model as modules, written by the save_pretrained of a transformers model, and no"
            " graph. Remedy: open it with from_pretrained of the class that wrote it, or AutoModelForCausalLM"
        )
    index = _index(directory, version)

    def read(name: str) -> dict[str, Any]:
        content = read_bytes(directory / name, FILE_LIMIT)
        if index is not None:
            index.check_file(directory / name, content)
        return json_object(content, directory / name)

    if index is not None:
        index.check_file(directory / "config.json", content)
    entry = entry_of(directory, settings)
    if entry == SHARD_INDEX:
        read(entry)
    saved = read("graph.json")
    try:
        graphs = {MAIN: StoredGraph(graph_from_json(saved["nodes"]), saved["calling"])}
        for name, one in saved.get("variants", {}).items():
            graphs[name] = StoredGraph(graph_from_json(one["nodes"]), one["calling"])
        refused = {str(name): str(reason) for name, reason in saved.get("refused_variants", {}).items()}
        inventory = Inventory.from_dict(read(INVENTORY))
        lobcq_config = LobcqConfig.from_dict(settings["lobcq_config"])
        parameters = set(saved["parameters"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory} is damaged: {type(error).__name__}: {error}") from None
    return _Described(graphs, refused, lobcq_config, inventory, config or None, entry, parameters, index)


def is_own(name: str) -> bool:
    """Whether a file belongs to a model, and goes with it when it is replaced; others are the user's."""
    return name in (*FILES, SHARD_INDEX, WEIGHTS_OF_VERSION_1) or is_shard(name)


def is_checkpoint(directory: Path) -> bool:
    """Whether the folder looks like one of ours."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _config(checkpoint: Checkpoint, shards: Shards) -> dict[str, Any]:
    quantization = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "lobcq_config": checkpoint.lobcq_config.to_dict(),
        **({} if shards.entry == WEIGHTS else {ENTRY: shards.entry}),
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


def check_version(where: str, settings: Any) -> int:
    """The format version of a `quantization_config`.

    Raises:
        CheckpointError: it is not of this package, or of a version that is not read; names `where` it was found.
    """
    if not isinstance(settings, Mapping) or settings.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{where} is not a quantized model of this package; write one with save_pretrained")
    version = settings.get("format_version")
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{where} has format version {version}, this release reads {' and '.join(map(str, READABLE_VERSIONS))}:"
            " update lobcq-fx, or quantize the model again"
        )
    return int(version)


def _index(directory: Path, version: int) -> FolderIndex | None:
    if version > 1:
        return FolderIndex.parse(read_bytes(directory / INDEX, FILE_LIMIT), directory / INDEX)
    logger.warning(
        "%s was written by release 0.1, without digests: damage to it may go unnoticed. Save it again to have them",
        directory,
    )
    return None


def json_bytes(value: Any) -> bytes:
    """A file's content."""
    return (json.dumps(value, indent=1) + "\n").encode()
