"""A skeleton, traced, planned and emitted: what will be stored, and of which parameters it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.codebook_choice import given_codebooks
from lobcq_fx.config import LobcqConfig
from lobcq_fx.encoding import let_go_of, register_codebooks
from lobcq_fx.errors import NotStreamedError
from lobcq_fx.frontends.base import FrontEnd
from lobcq_fx.graph.attributes import get_attribute, has_attribute, register_attribute, replace_attribute
from lobcq_fx.inventory import Inventory
from lobcq_fx.model import ModelParts
from lobcq_fx.modules.packed_weight import PARTS, PackedWeight
from lobcq_fx.pipeline import Planned, Progress, emit_graphs, size_of, trace_and_plan
from lobcq_fx.plan import PlannedMatmul, PlannedWeight, QuantizationPlan
from lobcq_fx.storage.checkpoint import descriptions
from lobcq_fx.storage.index import TensorDigest, described, digest_of, digested
from lobcq_fx.storage.shards import Shards
from lobcq_fx.storage.stored_tensors import stored_names
from lobcq_fx.streaming.skeleton import Skeleton
from lobcq_fx.tracing.trace import MAIN


@dataclass(frozen=True)
class Use:
    """What becomes of one parameter.

    weights: what it is encoded as, each with the bytes of float that this takes the place of.
    kept: the names under which it is stored as it is.
    """

    weights: tuple[tuple[PlannedWeight, int], ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of all that is stored of it."""
        return (*self.kept, *(f"{weight.stored}.{part}" for weight, _ in self.weights for part in PARTS))


@dataclass(frozen=True)
class Outline:
    """A skeleton that was traced and planned.

    graph_modules: normalized, by name. codebooks: of the plan's formats. size: scalars and bytes of the float model.
    """

    skeleton: Skeleton
    config: LobcqConfig
    planned: Planned
    graph_modules: Mapping[str, fx.GraphModule]
    codebooks: CodebookSets
    size: tuple[int, int]

    @classmethod
    def of(
        cls, skeleton: Skeleton, config: LobcqConfig, example_inputs: Any, *, static_cache: bool, progress: Progress
    ) -> Outline:
        """Trace and plan, by the code that does it for models.

        Raises:
            TraceError, CallError, ConfigError: as `quantize`.
            NotStreamedError: a weight is computed of others.
        """
        size = size_of(skeleton.model.parameters())
        planned = trace_and_plan(skeleton.model, config, example_inputs, static_cache=static_cache, report=progress)
        graph_modules = planned.tried.graphs_without(planned.unlike)
        for graph_module in graph_modules.values():
            _check_tensors(graph_module, skeleton)
        return cls(skeleton, config, planned, graph_modules, given_codebooks(config, planned.plan.formats), size)

    @property
    def plan(self) -> QuantizationPlan:
        """What becomes of every matmul."""
        return self.planned.plan

    @property
    def root(self) -> fx.GraphModule:
        """The main graph."""
        return self.graph_modules[MAIN]

    def digest(self) -> str:
        """Of all that is known before a large weight is read."""
        graphs = {name: one.code for name, one in self.graph_modules.items()}
        codebooks = {name: digested(one).blake3 for name, one in self.codebooks.named().items()}
        known = [graphs, codebooks, self.skeleton.model.config.to_json_string(use_diff=False)]
        return digest_of(json.dumps(known, sort_keys=True).encode())


@dataclass(frozen=True)
class Made:
    """What calibration has made, and stored elsewhere.

    tensors: dtypes and shapes, by the names that they have in the folder. small: those whose content graphs may follow,
    such as scales of activations, which siblings share where they are equal. rotated: matmuls whose operands are.
    """

    tensors: Mapping[str, TensorDigest]
    small: Mapping[str, Tensor]
    rotated: frozenset[PlannedMatmul]


@dataclass(frozen=True)
class Emission:
    """What a folder will hold, and nothing with the memory of a weight.

    front_end: of the model. config: as it is saved. generation_config: None where the model has none.
    descriptions: the files beside the weights, as yet without an inventory.
    tensors: each stored tensor's dtype and shape, by name. shards: the files that they are in.
    ready: those that are known already.
    uses: of each parameter that has to be read. sizes: their bytes. size: scalars and bytes of the float model.
    """

    front_end: FrontEnd
    config: dict[str, Any]
    generation_config: Any
    descriptions: Mapping[str, bytes]
    plan: QuantizationPlan
    codebooks: CodebookSets
    tensors: Mapping[str, TensorDigest]
    shards: Shards
    ready: Mapping[str, Tensor]
    uses: Mapping[str, Use]
    sizes: Mapping[str, int]
    size: tuple[int, int]


def emit(outline: Outline, made: Made | None = None, max_shard_size: int | str | None = None) -> Emission:
    """Emit a skeleton's graphs by the code that does it for models.

    Args:
        outline: its graphs change.
        made: what need not be made of parameters any more.
        max_shard_size: of a file of weights.

    Raises:
        NotStreamedError: a weight is of another dtype than the model.
    """
    planned, plan, skeleton = outline.planned, outline.plan, outline.skeleton
    uses = _reserve(outline.root, plan, outline.codebooks, skeleton)
    if made is not None:
        uses = {}
        _reserve_made(outline.root, plan, made)
    rotated = frozenset[PlannedMatmul]() if made is None else made.rotated
    emitted = emit_graphs(outline.graph_modules, plan, outline.codebooks, rotated)
    inventory = Inventory((), *outline.size, outline.size[1])
    parts = planned.tried.parts(emitted, planned.unlike, outline.config, inventory)
    tensors, ready, uses = _stored(parts, uses, frozenset() if made is None else made.tensors.keys(), skeleton)
    checkpoint = parts.checkpoint()
    shards = Shards.split(tensors, max_shard_size)
    assert checkpoint.config is not None, "a model of transformers has a configuration"
    return Emission(
        planned.tried.front_end, checkpoint.config, parts.generation_config, descriptions(checkpoint, shards, tensors),
        plan, outline.codebooks, tensors, shards, ready, uses, {name: skeleton.size_of(name) for name in uses},
        outline.size,
    )  # fmt: skip


def _check_tensors(graph_module: fx.GraphModule, skeleton: Skeleton) -> None:
    """That each is a parameter, whole and row by row: none was computed of others, or copied because it is written to.

    Stand-ins have no content. Of what has another shape than its parameter, such as the matrix of a patch embedding,
    the shape alone is known.
    """
    parameters = dict(graph_module.named_parameters())
    for name, tensor in {**parameters, **dict(graph_module.named_buffers())}.items():
        if tensor.numel() and (name in parameters or skeleton.reads(name)) and not skeleton.owns(tensor):
            raise NotStreamedError(f"{name} is computed of the model's weights, or written to by it")
        parameter = skeleton.name_of(tensor)
        if parameter and not (tensor.is_contiguous() and tensor.nbytes == skeleton.size_of(parameter)):
            raise NotStreamedError(f"{name} is a part of {parameter}, or has its scalars in another order")


def _reserve(
    root: fx.GraphModule, plan: QuantizationPlan, codebooks: CodebookSets, skeleton: Skeleton
) -> dict[str, Use]:
    """Put packed weights of no content, whose memory is never touched, in place of the float ones.

    Returns:
        What each parameter is encoded as.
    """
    register_codebooks(root, codebooks)
    names = {weight: skeleton.name_of(get_attribute(root, weight.source)) for weight in plan.weights}
    encoded: dict[str, tuple[tuple[PlannedWeight, int], ...]] = {}
    for weight, name in names.items():
        if name is None:
            raise NotStreamedError(f"{weight.source} is of another dtype than the model")
        encoded[name] = (*encoded.get(name, ()), (weight, let_go_of(weight, root)))
        register_attribute(root, weight.stored, PackedWeight.empty(weight.shape, weight.spec, torch.device("cpu")))
    return {name: Use(weights) for name, weights in encoded.items()}


def _reserve_made(root: fx.GraphModule, plan: QuantizationPlan, made: Made) -> None:
    """The same for what is no packed weight: parameters that smoothing has divided, and scales of activations."""
    packed = {f"{weight.stored}.{part}" for weight in plan.weights for part in PARTS}
    for name, one in made.tensors.items():
        if name in packed:
            continue
        tensor = made.small.get(name)
        if tensor is None:
            tensor = torch.empty(one.shape, dtype=getattr(torch, one.dtype), device="cpu")
        if has_attribute(root, name):
            replace_attribute(root, name, tensor)
        else:
            register_attribute(root, name, tensor)


def _stored(
    parts: ModelParts, uses: dict[str, Use], made: AbstractSet[str], skeleton: Skeleton
) -> tuple[dict[str, TensorDigest], dict[str, Tensor], dict[str, Use]]:
    """The tensors that the graphs refer to, those of them that are known, and what becomes of each parameter."""
    root = parts.graphs[MAIN].graph_module
    packed = made | {name for use in uses.values() for name in use.stored}
    tensors, ready = {}, {}
    for name in stored_names([one.graph_module.graph for one in parts.graphs.values()]):
        tensor = get_attribute(root, name)
        tensors[name] = described(tensor)
        parameter = skeleton.name_of(tensor)
        if name in packed:
            continue
        if parameter is None:
            ready[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        else:
            use = uses.get(parameter, Use())
            uses[parameter] = Use(use.weights, (*use.kept, name))
    return tensors, ready, uses
