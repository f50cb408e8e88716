"""Capture Hugging Face models. The only file that uses `transformers.exporters`, which is experimental."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.nn import functional
from torch.utils import _pytree as pytree
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.exporters.configs import DynamoConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.utils import logging as transformers_logging

from lobcq_fx.errors import CallError, TraceError
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.float_causal_lm import (
    BATCH,
    CACHE,
    CACHE_REMEDY,
    PAST,
    QUERY,
    as_named_by,
    check_cache_layers,
    continuation,
    default_positions,
    has_shifted_loss,
    has_states,
    windows_of,
)
from lobcq_fx.frontends.generation_overrides import check_overrides
from lobcq_fx.frontends.graph_check import default_positions_hold
from lobcq_fx.frontends.growing_cache import Windows
from lobcq_fx.frontends.in_place_cache import InPlaceCache
from lobcq_fx.frontends.output_types import language_model_output_name
from lobcq_fx.frontends.plain_outputs import plain_outputs
from lobcq_fx.frontends.recurrent_call import RecurrentCall
from lobcq_fx.frontends.recurrent_states import FixedState, LayerStates
from lobcq_fx.frontends.static_cache_call import StaticCacheCall
from lobcq_fx.frontends.traced_states import ReplacedStates, ReplacedStatesAndKeys, scans_as_operators
from lobcq_fx.frontends.windowed_layers import sliding
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from lobcq_fx.tracing.assumptions import SizeDecisions
from lobcq_fx.tracing.calling import bind_arguments
from lobcq_fx.tracing.guards import SizeGuards
from lobcq_fx.tracing.sizes import fixed_size
from lobcq_fx.tracing.structure import Structure
from lobcq_fx.tracing.trace import (
    TracedModel,
    drop_constant_inputs,
    flatten_program,
    plain_graph_module,
    tracing,
    widen_batch,
)

logger = logging.getLogger(__name__)

TRUSTED = "transformers"
"""Its attention asks whether there is one token, to take another kernel for the same result."""

ROWS, ANY_LENGTHS = 3, ((0, 1), (0, 2), (0, 4097), (700, 1), (700, 300))
"""Calls that every graph with states serves: their batch, tokens before them and tokens."""

TOKEN_DEFAULTS = {"attention_mask": 1, "token_type_ids": 0}
"""What encoders take for arguments of the shape of input_ids that a call leaves out."""


def is_causal_lm(model: object) -> bool:
    """Whether `model` is a decoder-only Hugging Face language model with a head, so that it can generate."""
    return isinstance(model, PreTrainedModel) and model.can_generate() and not model.config.is_encoder_decoder


def reads_images(model: PreTrainedModel) -> bool:
    """Whether a language model has a part of its prompt from images."""
    return getattr(model.config, "image_token_id", None) is not None and hasattr(model.base_model, "get_image_features")


def is_seq2seq_lm(model: object) -> bool:
    """Whether `model` is a Hugging Face encoder-decoder whose decoder generates tokens."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or not model.config.is_encoder_decoder:
        return False
    return {"decoder_input_ids", "encoder_outputs"} <= inspect.signature(model.forward).parameters.keys()


def trace_causal_lm(model: PreTrainedModel) -> TracedModel:
    """One graph that serves prefill (empty cache), continuation and single-token decode.

    Inputs: input_ids [B, T], attention_mask [B, P + T], position_ids [B, T] and logits_to_keep [L] where the model
    takes them, then key and value [B, H, P, D] of each layer that attends. Outputs: logits [B, L or T, V], then the
    grown keys and values [B, H, P + T, D]. Layers that slide a window may come with fewer positions than P, all with
    the last W ones, and grow to W + T. Of a recurrent or hybrid model both end with the states of a fixed size; where
    nothing attends, the mask is [B, T].

    Raises:
        TraceError: the model cannot be captured, keeps a cache of another kind, or generates in a way of its own.
    """
    windows = windows_of(model)
    if windows:
        try:
            return _trace_causal_lm(model, windows)
        except TraceError as error:
            logger.info("layers that slide a window are kept whole: %s", error)
    return _trace_causal_lm(model, ())


def _trace_causal_lm(model: PreTrainedModel, windows: Windows) -> TracedModel:
    """The graph that takes layers with these windows, or whole ones alone."""
    vocab_size = model.config.get_text_config().vocab_size
    with tracing(model), torch.no_grad(), SizeDecisions(TRUSTED) as decisions:
        check_cache_layers(model)
        check_overrides(model)
        shifted_loss = has_shifted_loss(model, vocab_size)
        with plain_outputs(model):
            inputs, output = continuation(model)
            output_type = language_model_output_name(type(model).__name__, output)
            layers = inputs["past_key_values"].layers
            kept = [LayerStates.of(layer) for layer in layers]
            attending = [layer for layer, of in zip(layers, kept, strict=True) if of.attends]
            graph_module = _causal_lm_graph(model, inputs, kept, windows)
            names = tuple(name for name in inputs if name != "past_key_values")
            settings: dict[str, Any] = {
                "inputs": names,
                "cache_heads": tuple(
                    (layer.keys.shape[1], *(s.shape[3] for s in (layer.keys, layer.values))) for layer in attending
                ),
                "cache_dtype": str(attending[0].keys.dtype if attending else model.dtype).removeprefix("torch."),
                **default_positions(model),
                "vocab_size": vocab_size,
                "output_type": output_type,
                "shifted_loss": shifted_loss,
                "windows": windows,
                "guards": _guards(decisions, graph_module, (*names, *(["a key"] if attending else []))),
            }
            calling = CausalLMCall(**settings)
            if has_states(model):
                calling = RecurrentCall(**settings, layers=tuple(kept))
                _check_any_length(model, calling)
            traced = TracedModel(graph_module, calling)
            return replace(traced, calling=replace(calling, default_positions=default_positions_hold(model, traced)))


def _causal_lm_graph(
    model: PreTrainedModel, inputs: dict[str, Any], kept: Sequence[LayerStates], windows: Windows
) -> fx.GraphModule:
    """The graph of a continuation, whose cache has layers that keep what `kept` says."""
    if not has_states(model):
        with sliding(model, inputs["past_key_values"], windows):
            graph_module = plain_graph_module(export(model, inputs, _causal_lm_dynamic_shapes(inputs)))
        drop_constant_inputs(graph_module, pytree.tree_leaves(inputs))
        return graph_module
    cache = inputs["past_key_values"]
    pairs = list(zip(kept, cache.layers, strict=True))
    cache.layers = [
        of.layer(
            getattr(layer, "keys", None), getattr(layer, "values", None), iter(of.tensors_of(layer)),
            ReplacedStates, ReplacedStatesAndKeys,
        )
        for of, layer in pairs
    ]  # fmt: skip
    shapes = _causal_lm_dynamic_shapes(inputs)
    shapes["past_key_values"] = [
        {0: Dim.AUTO, 2: Dim.AUTO} if grows else {0: Dim.AUTO} for of in kept for grows in _growing(of)
    ]
    with scans_as_operators(model):
        graph_module = plain_graph_module(export(model, inputs, shapes))
    drop_constant_inputs(graph_module, pytree.tree_leaves(inputs))
    _keys_first(graph_module, kept)
    _check_recurrent(graph_module, [state for of in kept for state in of.fixed])
    return graph_module


def _check_any_length(model: PreTrainedModel, calling: RecurrentCall) -> None:
    """That no loop over tokens, or over chunks of them, is in the graph with as many rounds as the example had.

    Raises:
        TraceError: one is, so that the graph would serve calls of some lengths alone.
    """
    heads, width, _ = calling.cache_heads[0] if calling.attends else (1, 1, 1)
    for past, query in ANY_LENGTHS:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(calling.inputs, (ROWS, query))
        shapes |= {"attention_mask": (ROWS, past * calling.attends + query), "logits_to_keep": (1,)}
        sizes = [*(shapes[name] for name in calling.inputs), (ROWS, heads, past, width)]
        try:
            calling.guards.check([torch.empty(s, dtype=torch.uint8, device="meta") for s in sizes], calling.name_of)
        except CallError as error:
            reason = str(error).partition(", and for others")[0]
            raise TraceError(f"{type(model).__name__} scans in a loop of its own: {reason}. {CACHE_REMEDY}") from None


def _growing(kept: LayerStates) -> list[bool]:
    """For each tensor of a layer, in the order of its attributes, whether it grows with the tokens."""
    return [True] * (2 * kept.attends) + [False] * len(kept.fixed)


def _keys_first(graph_module: fx.GraphModule, kept: Sequence[LayerStates]) -> None:
    """Put the keys and values of all layers before their states of a fixed size, among inputs and outputs."""
    grows = [one for of in kept for one in _growing(of)]
    order = sorted(range(len(grows)), key=lambda place: not grows[place])
    graph = graph_module.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    states = placeholders[len(placeholders) - len(grows) :]
    last = placeholders[len(placeholders) - len(grows) - 1]
    for place in order:
        last.append(states[place])
        last = states[place]
    output = graph.output_node()
    results: Sequence[Any] = output.args[0]  # type: ignore[assignment]
    assert len(results) == 1 + len(grows), "an output for each state"
    output.args = ((results[0], *(results[1 + place] for place in order)),)
    graph_module.recompile()


def trace_static_cache(model: PreTrainedModel, causal: CausalLMCall) -> TracedModel:
    """One graph for prefill, continuation and decode on a cache of a fixed size, which it writes in place.

    Inputs: those of `trace_causal_lm` before its cache, the mask over the whole cache, [B, C]; then key and value
    [B, H, C, D] of each layer, and the positions [T] of the call's tokens in the cache. Output: logits alone.

    Args:
        model: as `trace_causal_lm` has traced it.
        causal: how the graph of that trace is called.

    Raises:
        TraceError: the model cannot be captured with such a cache.
    """
    with tracing(model), torch.no_grad(), SizeDecisions(TRUSTED) as decisions, plain_outputs(model):
        inputs, _ = continuation(model)
        inputs["attention_mask"] = functional.pad(inputs["attention_mask"], (0, CACHE - PAST - QUERY))
        inputs["past_key_values"] = _in_place(inputs["past_key_values"], model.device)
        shapes = _causal_lm_dynamic_shapes(inputs)
        shapes["past_key_values"].append({0: Dim.AUTO})
        graph_module = plain_graph_module(export(model, inputs, shapes))
        drop_constant_inputs(graph_module, pytree.tree_leaves(inputs))
        output = graph_module.graph.output_node()
        output.args = ((output.args[0][0],),)  # type: ignore[index]  # the cache it returns is the one that came in
        EliminateDeadCode()(graph_module)
        _check_sizes(graph_module.graph.find_nodes(op="placeholder"))
    return TracedModel(
        graph_module, StaticCacheCall(causal, _guards(decisions, graph_module, (*causal.inputs, "a key")))
    )


OUTPUTS = ("output_hidden_states", "output_attentions")
"""What a call may say that the graph has to have been traced with."""


def trace_pretrained(
    model: PreTrainedModel, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> TracedModel:
    """Capture an encoder, or any Hugging Face model without a cache, with dynamic batch and length.

    Args:
        model: the model.
        args, kwargs: an example call; None makes one up from the model's configuration. An attention mask of ones gets
            one zero, since export would otherwise drop it from the graph. What it says of outputs becomes part of the
            graph.

    Raises:
        TraceError: the model cannot be captured, or no example can be made up.
    """
    if {"decoder_input_ids", "decoder_input_values"} & inspect.signature(model.forward).parameters.keys():
        raise TraceError(
            f"{type(model).__name__} is an encoder-decoder that generates nothing, which is not supported. Remedy:"
            " quantize its class for conditional generation, or model.get_encoder() alone, and pass what that returns"
            " to the float model as encoder_outputs"
        )
    given = kwargs if kwargs is not None else made_up_inputs(model)
    names, bound = bind_arguments(model, args, given)
    said = {name: bound.pop(name) for name in OUTPUTS if name in bound}
    flags = traced_flags(model) | said
    bound = widen_batch(bound)
    mask = bound.get("attention_mask")
    if isinstance(mask, Tensor) and bool(mask.all()):
        bound["attention_mask"] = mask.clone()
        bound["attention_mask"][0, -1] = 0
    with tracing(model), torch.no_grad(), SizeDecisions(TRUSTED) as decisions:
        program = export(model, {**bound, **flags}, pytree.tree_map(_batch_and_length, bound))
    graph_module, calling = flatten_program(program, bound, names, Structure(program.call_spec.out_spec))
    fills = {name: fill for name, fill in TOKEN_DEFAULTS.items() if name in bound} if "input_ids" in bound else {}
    guards = decisions.guards(graph_module)
    settings = {name: bool(getattr(model.config, name)) for name in OUTPUTS} | flags
    return TracedModel(graph_module, replace(calling, fills=fills, guards=guards, settings=settings))


def traced_flags(model: PreTrainedModel) -> dict[str, bool]:
    """What a model without a cache of its own is traced with.

    A decoder without a head would return its cache; nothing here could take it back in.
    """
    flags = {"return_dict": model.config.return_dict is not False}
    return flags | ({"use_cache": False} if hasattr(model.config, "use_cache") else {})


def export(model: PreTrainedModel, inputs: dict[str, Any], dynamic_shapes: dict[str, Any]) -> ExportedProgram:
    """Capture a call of a model, with the cache, if any, under `past_key_values`."""
    with _quiet_transformers():
        config = DynamoConfig(dynamic=True, dynamic_shapes=as_named_by(model, dynamic_shapes))
        exporter = DynamoExporter()
        # transformers 5.17 returns the program from export(); later releases from export_program(), with metadata.
        export_program = getattr(exporter, "export_program", exporter.export)
        result = export_program(model, as_named_by(model, inputs), config)
    program = result[0] if isinstance(result, tuple) else result
    assert isinstance(program, ExportedProgram)
    return program


def _guards(decisions: SizeDecisions, graph_module: fx.GraphModule, names: tuple[str, ...]) -> SizeGuards:
    """Of the first inputs: those before the cache, and of it the first key, which stands for all: they share sizes."""
    return decisions.guards(graph_module).among(len(names))


def _causal_lm_dynamic_shapes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    shapes: dict[str, Any] = {
        name: dict.fromkeys(range(value.dim()), Dim.AUTO) for name, value in inputs.items() if isinstance(value, Tensor)
    }
    layers = len(inputs["past_key_values"].layers)
    shapes["past_key_values"] = [{0: Dim.AUTO, 2: Dim.AUTO} for _ in range(2 * layers)]
    return shapes


def _in_place(cache: DynamicCache, device: torch.device) -> InPlaceCache:
    """A cache of CACHE tokens like a grown one, at the call that follows its PAST ones."""
    layers = []
    for grown in cache.layers:
        layer = DynamicLayer()
        layer.lazy_initialization(grown.keys, grown.values)
        layer.keys, layer.values = (
            functional.pad(state, (0, 0, 0, CACHE - state.shape[2])) for state in (grown.keys, grown.values)
        )
        layers.append(layer)
    return InPlaceCache(layers, _positions(PAST, PAST + QUERY, device))


def _check_sizes(placeholders: Iterable[fx.Node]) -> None:
    """A graph gives wrong results, not errors, for sizes that tracing fixed: only heads and widths may be."""
    for node in placeholders:
        shape = [fixed_size(size) for size in node.meta["val"].shape]
        free = shape[::2] if len(shape) == 4 else shape
        if any(size is not None for size in free):
            raise TraceError(f"tracing fixed a size of {node.name}, which has the shape {shape}")


def _check_recurrent(graph_module: fx.GraphModule, fixed: Sequence[FixedState]) -> None:
    """The same of a graph that ends with states of a fixed size, whose batch is free; and note what dtypes they have.

    The exporter casts examples to the model's dtype, which is not that of every state.
    """
    placeholders = list(graph_module.graph.find_nodes(op="placeholder"))
    before, states = placeholders[: len(placeholders) - len(fixed)], placeholders[len(placeholders) - len(fixed) :]
    _check_sizes(before)
    for node, state in zip(states, fixed, strict=True):
        value = node.meta["val"]
        if fixed_size(value.shape[0]) is not None or tuple(value.shape[1:]) != state.shape:
            raise TraceError(f"tracing fixed a size of {node.name}, which has the shape {list(value.shape)}")
        node.meta["val"] = value.to(getattr(torch, state.dtype))


def made_up_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """One call of a model, from its configuration.

    Raises:
        TraceError: its inputs are none that can be made up.
    """
    config, device = model.config, model.device
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if model.main_input_name == "pixel_values" and size is not None and channels is not None:
        sizes = size if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": torch.zeros(BATCH, channels, *sizes, device=device, dtype=model.dtype)}
    if model.main_input_name != "input_ids":
        name, wanted = type(model).__name__, model.main_input_name
        raise TraceError(
            f"cannot make up an example for {name}, whose input is {wanted!r} of a size that its configuration does not"
            f" tell: pass example_inputs={{{wanted!r}: ...}}"
        )
    ids = _positions(0, BATCH * PAST, device).view(BATCH, PAST) % 7
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "type_vocab_size", 0) and "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def _positions(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, dtype=torch.long, device=device)


def _batch_and_length(leaf: Any) -> Any:
    """Batch and, for token inputs [B, T], length are dynamic; images and features keep their sizes."""
    if not isinstance(leaf, Tensor):
        return None
    dynamic = range(leaf.dim()) if leaf.dim() <= 2 else range(1)
    return {dim: Dim.AUTO if dim in dynamic and leaf.shape[dim] > 1 else Dim.STATIC for dim in range(leaf.dim())}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """The exporter warns about being experimental and about version drift; our tests are what validates it here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
