"""Capture Hugging Face encoder-decoders: one graph of a whole call, which `seq2seq_parts` takes apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.float_seq2seq import (
    BATCH,
    QUERY,
    REMEDY,
    SOURCE,
    continuation,
    decoder_inputs,
    label_shift,
    main_inputs,
    seq2seq_outputs,
)
from lobcq_fx.frontends.generation_overrides import check_overrides
from lobcq_fx.frontends.output_types import (
    CACHE_NAME,
    LAST_HIDDEN_STATE,
    RETURNED_OF_SEQ2SEQ,
    language_model_output_name,
)
from lobcq_fx.frontends.seq2seq_call import MAIN_INPUTS, MASK, Seq2SeqCall
from lobcq_fx.frontends.seq2seq_parts import check_parts
from lobcq_fx.frontends.transformers_trace import TRUSTED, export
from lobcq_fx.tracing.assumptions import SizeDecisions
from lobcq_fx.tracing.sizes import fixed_size
from lobcq_fx.tracing.trace import TracedModel, drop_constant_inputs, plain_graph_module, tracing

OTHER, OTHER_SOURCE = 3, 7
"""Sequences, and their length, that are not the example's."""


def trace_seq2seq(model: PreTrainedModel, example: Tensor | None) -> TracedModel:
    """One graph of a call that encodes, and decodes on an empty or a grown self-attention cache.

    Args:
        model: with a decoder that generates.
        example: of what its encoder reads; None makes one up.

    Raises:
        TraceError: the model cannot be captured, keeps another cache than keys and values, generates in a way of its
            own, or cannot be taken apart into an encoder and a decoder.
    """
    if model.main_input_name not in MAIN_INPUTS:
        raise TraceError(
            f"{type(model).__name__} reads {model.main_input_name}; encoder-decoders of {' or '.join(MAIN_INPUTS)} are"
            f" supported. {REMEDY}"
        )
    with tracing(model), torch.no_grad(), SizeDecisions(TRUSTED) as decisions:
        check_overrides(model)
        with seq2seq_outputs(model):
            inputs, output = continuation(model, example)
            output_name = language_model_output_name(type(model).__name__, output, {LAST_HIDDEN_STATE})
            graph_module = plain_graph_module(export(model, inputs, _dynamic_shapes(inputs)))
            drop_constant_inputs(graph_module, pytree.tree_leaves(inputs))
            names = [name for name in inputs if name != "past_key_values"]
            names = _without_unread_mask(model, graph_module, names)
            own, cross = (_heads(one) for one in _layers(getattr(output, CACHE_NAME)))
            _check_outputs(model, graph_module, 2 * len(own) + 2 * len(cross))
            rule, cached = label_shift(model, main_inputs(model, example, BATCH, SOURCE))
            main = graph_module.graph.find_nodes(op="placeholder")[0]
            encoder = tuple(name for name in names if not name.startswith("decoder_"))
            calling = Seq2SeqCall(
                encoder_inputs=encoder,
                decoder_inputs=tuple(name for name in names if name.startswith("decoder_")),
                input_shape=tuple(fixed_size(size) for size in main.meta["val"].shape),
                cache_heads=own,
                cross_heads=cross,
                cache_dtype=str(output.encoder_last_hidden_state.dtype).removeprefix("torch."),
                hidden_size=output.encoder_last_hidden_state.shape[-1],
                vocab_size=output.logits.shape[-1],
                output_type=output_name,
                label_shift=rule,
                pad_token_id=model.config.pad_token_id if rule else None,
                decoder_start_token_id=model.config.decoder_start_token_id if rule == "start" else None,
                cached_with_labels=cached,
                guards=decisions.guards(graph_module).among(len(names) + 1),
            )
            traced = TracedModel(graph_module, calling)
            call = {**main_inputs(model, example, OTHER, OTHER_SOURCE), **decoder_inputs(model, OTHER, QUERY)}
            check_parts(traced, calling.flatten((), call))  # refused before it is quantized
            return traced


def _dynamic_shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    """Batches and lengths; of an input that is no tokens, what is behind its batch stays as it is."""
    shapes: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            free = range(value.dim()) if value.dim() <= 2 else range(1)
            shapes[name] = {dim: Dim.AUTO if dim in free else Dim.STATIC for dim in range(value.dim())}
    layers = len(inputs["past_key_values"].self_attention_cache.layers)
    shapes["past_key_values"] = [{0: Dim.AUTO, 2: Dim.AUTO} for _ in range(2 * layers)]
    return shapes


def _without_unread_mask(model: PreTrainedModel, graph_module: fx.GraphModule, names: list[str]) -> list[str]:
    """The names of the inputs, without a mask of the encoder that changes nothing.

    Raises:
        TraceError: what the encoder reads is no tokens, and masked all the same.
    """
    if MASK not in names:
        return names
    mask = graph_module.graph.find_nodes(op="placeholder")[names.index(MASK)]
    if mask.users and model.main_input_name != "input_ids":
        raise TraceError(f"{type(model).__name__} reads a mask of {model.main_input_name}. {REMEDY}")
    if mask.users:
        return names
    graph_module.graph.erase_node(mask)
    graph_module.recompile()
    return [name for name in names if name != MASK]


def _layers(cache: Any) -> tuple[Any, Any]:
    return cache.self_attention_cache.layers, cache.cross_attention_cache.layers


def _heads(layers: Any) -> tuple[tuple[int, int, int], ...]:
    return tuple((layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers)


def _check_outputs(model: PreTrainedModel, graph_module: fx.GraphModule, states: int) -> None:
    """That the graph returns logits, states and the hidden state, each a tensor."""
    (results,) = graph_module.graph.output_node().args
    found = len(results) if isinstance(results, tuple) else 0
    if found != 2 + states or not all(isinstance(one, fx.Node) for one in results):  # type: ignore[union-attr]
        wanted = ", ".join(sorted(RETURNED_OF_SEQ2SEQ - {"loss"}))
        raise TraceError(
            f"{type(model).__name__} gives {found} results where {wanted} are {2 + states} tensors. {REMEDY}"
        )
