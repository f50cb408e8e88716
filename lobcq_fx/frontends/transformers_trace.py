"""Capture Hugging Face models. The only file that uses `transformers.exporters`, which is experimental."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
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
from transformers.utils import logging

from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.float_causal_lm import (
    BATCH,
    CACHE,
    PAST,
    QUERY,
    as_named_by,
    check_cache_layers,
    continuation,
    has_shifted_loss,
    positions_from_mask,
)
from lobcq_fx.frontends.generation_overrides import check_overrides
from lobcq_fx.frontends.graph_check import default_positions_hold
from lobcq_fx.frontends.in_place_cache import InPlaceCache
from lobcq_fx.frontends.output_types import language_model_output_name
from lobcq_fx.frontends.plain_outputs import plain_outputs
from lobcq_fx.frontends.static_cache_call import StaticCacheCall
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

TRUSTED = "transformers"
"""Its attention asks whether there is one token, to take another kernel for the same result."""

TOKEN_DEFAULTS = {"attention_mask": 1, "token_type_ids": 0}
"""What encoders take for arguments of the shape of input_ids that a call leaves out."""


def is_causal_lm(model: object) -> bool:
    """Whether `model` is a decoder-only Hugging Face language model with a head, so that it can generate."""
    return isinstance(model, PreTrainedModel) and model.can_generate() and not model.config.is_encoder_decoder


def is_seq2seq_lm(model: object) -> bool:
    """Whether `model` is a Hugging Face encoder-decoder whose decoder generates tokens."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or not model.config.is_encoder_decoder:
        return False
    return {"decoder_input_ids", "encoder_outputs"} <= inspect.signature(model.forward).parameters.keys()


def trace_causal_lm(model: PreTrainedModel) -> TracedModel:
    """One graph that serves prefill (empty cache), continuation and single-token decode.

    Inputs: input_ids [B, T], attention_mask [B, P + T], position_ids [B, T] and logits_to_keep [L] where the model
    takes them, then key and value [B, H, P, D] of each layer. Outputs: logits [B, L or T, V], then the grown keys and
    values [B, H, P + T, D].

    Raises:
        TraceError: the model cannot be captured, keeps a cache other than keys and values, or generates in a way of its
            own.
    """
    vocab_size = model.config.get_text_config().vocab_size
    with tracing(model), torch.no_grad(), SizeDecisions(TRUSTED) as decisions:
        check_cache_layers(model)
        check_overrides(model)
        shifted_loss = has_shifted_loss(model, vocab_size)
        with plain_outputs(model):
            inputs, output = continuation(model)
            output_type = language_model_output_name(type(model).__name__, output)
            graph_module = plain_graph_module(export(model, inputs, _causal_lm_dynamic_shapes(inputs)))
            drop_constant_inputs(graph_module, pytree.tree_leaves(inputs))
            layers = inputs["past_key_values"].layers
            names = tuple(name for name in inputs if name != "past_key_values")
            calling = CausalLMCall(
                inputs=names,
                cache_heads=tuple(
                    (layer.keys.shape[1], *(s.shape[3] for s in (layer.keys, layer.values))) for layer in layers
                ),
                cache_dtype=str(layers[0].keys.dtype).removeprefix("torch."),
                positions_from_mask=positions_from_mask(model),
                vocab_size=vocab_size,
                output_type=output_type,
                shifted_loss=shifted_loss,
                guards=_guards(decisions, graph_module, names),
            )
            traced = TracedModel(graph_module, calling)
            return replace(traced, calling=replace(calling, default_positions=default_positions_hold(model, traced)))


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
        _check_sizes(graph_module)
    return TracedModel(graph_module, StaticCacheCall(causal, _guards(decisions, graph_module, causal.inputs)))


def trace_pretrained(
    model: PreTrainedModel, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> TracedModel:
    """Capture an encoder, or any Hugging Face model without a cache, with dynamic batch and length.

    Args:
        model: the model.
        args, kwargs: an example call; None makes one up from the model's configuration. An attention mask of ones gets
            one zero, since export would otherwise drop it from the graph.

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
    bound = widen_batch(bound)
    mask = bound.get("attention_mask")
    if isinstance(mask, Tensor) and bool(mask.all()):
        bound["attention_mask"] = mask.clone()
        bound["attention_mask"][0, -1] = 0
    with tracing(model), torch.no_grad(), SizeDecisions(TRUSTED) as decisions:
        program = export(model, {**bound, **traced_flags(model)}, pytree.tree_map(_batch_and_length, bound))
    graph_module, calling = flatten_program(program, bound, names, Structure(program.call_spec.out_spec))
    fills = {name: fill for name, fill in TOKEN_DEFAULTS.items() if name in bound} if "input_ids" in bound else {}
    return TracedModel(graph_module, replace(calling, fills=fills, guards=decisions.guards(graph_module)))


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
    """Of the inputs before the cache and the first tensor of it, which stands for all: they share their sizes."""
    return decisions.guards(graph_module).among(len(names) + 1)


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


def _check_sizes(graph_module: fx.GraphModule) -> None:
    """A graph gives wrong results, not errors, for sizes that tracing fixed: only heads and widths may be."""
    for node in graph_module.graph.find_nodes(op="placeholder"):
        shape = [fixed_size(size) for size in node.meta["val"].shape]
        free = shape[::2] if len(shape) == 4 else shape
        if any(size is not None for size in free):
            raise TraceError(f"tracing fixed a size of {node.name}, which has the shape {shape}")


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
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
