"""`from_pretrained` of a quantized model: its class with packed linears and experts, whose tensors transformers reads.

A folder of `QuantizedModel.save_pretrained` says in its graph how each of them computes; one that transformers wrote,
in its configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from lobcq_fx.calibration.codebook_sets import MODULE
from lobcq_fx.errors import CheckpointError
from lobcq_fx.format import Encoded, EncodedStack, check_codebooks
from lobcq_fx.graph.attributes import get_attribute, has_attribute
from lobcq_fx.graph.stored_linear import ENCODERS, LINEARS, stored_linears
from lobcq_fx.integrations.places import Place, places, settle
from lobcq_fx.integrations.stored_layer import StoredLayer, read_by
from lobcq_fx.modules.packed_product import CONSTANTS, LinearSettings, PackedProduct
from lobcq_fx.modules.packed_weight import PARTS
from lobcq_fx.storage.checkpoint import load_checkpoint
from lobcq_fx.storage.stored_tensors import WEIGHTS_OF_VERSION_1, weights_of
from lobcq_fx.storage.validate import check_encoded

REMEDY = "Remedy: lobcq_fx.load(folder), which runs the graph"


class GraphFolder:
    """A folder of `QuantizedModel.save_pretrained`, checked as `lobcq_fx.load` checks it.

    Its graph is read for how linears compute, and its tensors are compared with what the class has: all that the class
    computes with must be there, and nothing of LO-BCQ may be left over.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """files: those with weights that transformers reads; its index of them may come from anyone."""
        folder = files[0].parent
        if not (folder / "graph.json").exists():
            raise CheckpointError(
                f"{folder} has no graph.json. Remedy: pass the whole folder that save_pretrained wrote; of a repository"
                " on a hub, what huggingface_hub.snapshot_download(repository) returns"
            )
        self.folder = folder
        with torch.device("cpu"):  # transformers makes models on "meta", whatever is allocated meanwhile
            self.saved = load_checkpoint(folder)
        astray = sorted({*files} ^ {folder / name for name in weights_of(folder) or {WEIGHTS_OF_VERSION_1}})
        if astray:
            raise CheckpointError(f"{folder}: its index of shards names other files than it has, as {astray[0]}")
        self.layers: dict[str, StoredLayer] = {}

    def prepare(self, model: PreTrainedModel) -> None:
        """Put packed products in their places in a model that has no tensors yet.

        Raises:
            CheckpointError: the graph does what the class cannot; names the layer or tensor, and the remedy.
        """
        names = _Names(model, self.saved.root.state_dict())
        stored = self._stored_layers()
        used = {name for one in stored.values() for name in one.constants.values() if name is not None}
        left_over = [one for one in names.stored if one.startswith(f"{MODULE}.") and one not in used]
        if left_over:
            raise CheckpointError(f"{self.folder}: {type(model).__name__} has no place for {left_over[0]}. {REMEDY}")
        found: list[Place] = []
        for layer, one in stored.items():
            place = names.place(layer)
            if place is not None:
                reason = _why_not(place, one)
                if reason is not None:
                    self._refuse(layer, reason)
                self.layers[place.layer] = one
                found.append(place)
            elif not names.outside(layer):
                self._refuse(layer, f"{type(model).__name__} has no such module")
        given = {names.tensor(one) for one in names.stored}
        self._check_complete(model, given | {place.weight_name for place in found})
        for place in found:
            place.replace(self.layers[place.layer].settings)
        constants = [f"{name}.{constant}" for name in self.layers for constant in CONSTANTS]
        model._keys_to_ignore_on_load_missing = _ignored(model._keys_to_ignore_on_load_missing, constants)
        unread = {names.tensor(one) for one in names.stored} - model.state_dict().keys()
        model._keys_to_ignore_on_load_unexpected = _ignored(model._keys_to_ignore_on_load_unexpected, unread)

    def finish(self, model: PreTrainedModel) -> dict[str, LinearSettings]:
        """Fill in the constants, which layers share in the folder, and lay weights out for the kernels."""
        root = self.saved.root
        for name, one in self.layers.items():
            packed = get_attribute(model, name)
            for constant, stored in one.constants.items():
                if stored is not None:
                    tensor = get_attribute(root, stored)
                    if constant == "input_scale":
                        tensor = tensor[packed.own_columns.start : packed.own_columns.stop]
                    kind = getattr(packed, constant)
                    setattr(packed, constant, tensor.to(packed.packed.codes.device, kind.dtype, copy=True))
        settle(model)
        for name, buffer in model.named_non_persistent_buffers():
            if has_attribute(root, name):  # as the graph has it, whatever transformers computes today
                buffer.copy_(get_attribute(root, name))
        return {name: one.settings for name, one in self.layers.items()}

    def _stored_layers(self) -> dict[str, StoredLayer]:
        """Each linear of the graphs by its layer, one way of computing each."""
        found: dict[str, StoredLayer] = {}
        multiplied = {record.layer for record in self.saved.inventory if record.smoothing == "multiplied"}
        for linear in (linear for one in self.saved.graphs.values() for linear in stored_linears(one.graph)):
            layer = linear.weight.removesuffix(".weight")
            try:
                this = StoredLayer.of(self.saved.root, linear, layer in multiplied)
            except ValueError as error:
                self._refuse(layer, str(error))
            if found.setdefault(layer, this) != this:
                self._refuse(layer, "it is called in two ways")
        for one in self.saved.graphs.values():
            _check_operators(self.folder, one.graph)
        return found

    def _check_complete(self, model: PreTrainedModel, given: set[str]) -> None:
        """That all a float model computes with is given, if only by another name of a tied weight."""
        optional = [re.compile(one) for one in model._keys_to_ignore_on_load_missing or ()]
        sources: dict[str, str] = model.all_tied_weights_keys
        present = {sources.get(name, name) for name in given}
        for name in sorted(model.state_dict().keys() - given):
            if sources.get(name, name) not in present and not any(one.search(name) for one in optional):
                raise CheckpointError(
                    f"{self.folder}: {type(model).__name__} needs {name}, which the folder does not have. Remedy: open"
                    " it with the class that was quantized, or by lobcq_fx.load(folder)"
                )

    def _refuse(self, layer: str, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.folder}: {layer} cannot be a module: {reason}. {REMEDY}")


class ModuleFolder:
    """A folder that transformers wrote, of a model with packed products.

    layers: how each of them computes, by name.
    """

    def __init__(self, layers: Mapping[str, LinearSettings]) -> None:
        self.stored = layers
        self.layers: dict[str, LinearSettings] = {}

    def prepare(self, model: PreTrainedModel) -> None:
        """Put packed products in their places in a model that has no tensors yet.

        Raises:
            CheckpointError: a layer is no linear of the model, and no stack of its experts.
        """
        names = _Names(model, self.stored)
        for layer, settings in self.stored.items():
            place = names.place(layer)
            if place is None and names.outside(layer):
                continue
            if place is None or place.obstacle is not None:
                raise CheckpointError(
                    f"config.json: {layer} is no linear of {type(model).__name__}. Remedy: open the folder with the"
                    " class that wrote it"
                )
            self.layers[place.layer] = settings
            place.replace(settings)

    def finish(self, model: PreTrainedModel) -> dict[str, LinearSettings]:
        """Check what was read, and lay it out for the kernels.

        Raises:
            CheckpointError: names the tensor that is missing, or not of the format.
        """
        for name, settings in self.layers.items():
            packed = get_attribute(model, name)
            assert isinstance(packed, PackedProduct)
            _check_content(name, packed, settings)
        settle(model)
        return self.layers


class _Names:
    """What names of a folder are in a model, which may be the base of the one that was saved, or have it for a base.

    stored: the folder's.
    """

    def __init__(self, model: PreTrainedModel, stored: Iterable[str]) -> None:
        self.stored = tuple(stored)
        self._model, self._prefix = model, f"{model.base_model_prefix}."
        self._places = {one.layer: one for one in places(model)}

    def place(self, layer: str) -> Place | None:
        """The place of a layer; None where the model has none."""
        return next((self._places[one] for one in self._candidates(layer) if one in self._places), None)

    def tensor(self, name: str) -> str:
        """The name of a tensor; the stored one where the model has none."""
        return next((one for one in self._candidates(name) if has_attribute(self._model, one)), name)

    def outside(self, name: str) -> bool:
        """Whether a name is one of the head that was saved on top of the model."""
        inside = [one.startswith(self._prefix) for one in self.stored]
        return self._model.base_model is self._model and any(inside) and not name.startswith(self._prefix)

    def _candidates(self, name: str) -> tuple[str, ...]:
        return name, name.removeprefix(self._prefix), f"{self._prefix}{name}"


def _why_not(place: Place, layer: StoredLayer) -> str | None:
    """Why a place cannot compute what a layer of a graph does."""
    if place.obstacle is not None:
        return place.obstacle
    *rows, columns = place.shape
    arrays, biased = layer.settings.spec.num_arrays(columns), place.biased
    if (tuple(rows), arrays, biased) != (layer.rows, layer.arrays, layer.biased):
        size = " x ".join(map(str, rows))
        name = type(place.model).__name__
        return f"{name} has {size} rows of {columns} there, bias={biased}, which the graph has not"
    return "its weight is the embedding's too" if place.tied else None


def _check_operators(folder: Path, graph: fx.Graph) -> None:
    """That a graph has no operators of LO-BCQ but linears, and what rotates and encodes for them."""
    known, rotations = (*LINEARS, *ENCODERS.values()), {read_by(linear)[1] for linear in stored_linears(graph)}
    for node in graph.nodes:
        ours = node.op == "call_function" and str(node.target).startswith("lobcq.")
        if ours and node.target not in known and node not in rotations:
            raise CheckpointError(f"{folder}: node {node.name!r} calls {node.target}, which no module does. {REMEDY}")


def _ignored(patterns: Iterable[str] | None, names: Iterable[str]) -> set[str]:
    """Patterns of names that transformers does not report, and these."""
    return {*(patterns or ()), *(f"^{re.escape(name)}$" for name in names)}


def _check_content(name: str, packed: PackedProduct, settings: LinearSettings) -> None:
    for tensor, value in packed.named_buffers():
        if not getattr(value, "_is_hf_initialized", False):  # transformers marks what it reads, and makes up the rest
            raise CheckpointError(f"the folder lacks {name}.{tensor}. Remedy: get it again")
    parts: dict[str, Tensor] = {part: getattr(packed.packed, part) for part in PARTS}
    kind, weight = (EncodedStack, name) if packed.packed.stack else (Encoded, f"{name}.weight")
    encoded = kind(**parts, codebooks=packed.codebooks, spec=settings.spec, columns=packed.packed.columns)
    check_encoded(weight, encoded)
    try:
        check_codebooks(packed.codebooks, settings.spec)
        if packed.activation_codebooks is not None:
            check_codebooks(packed.activation_codebooks, settings.activations)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
