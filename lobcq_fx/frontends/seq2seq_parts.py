"""The parts of an encoder-decoder's graph, which `generate()` runs one by one, and how each is called.

encoder            what the model reads -> its last hidden state, once
cross_attention    the hidden state -> each decoder layer's keys and values of it, once for every sequence
decoder            tokens, both attentions' keys and values -> logits and the grown ones, for every step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from lobcq_fx.errors import CallError, TraceError
from lobcq_fx.frontends.growing_cache import grow
from lobcq_fx.frontends.seq2seq_cache import states_of
from lobcq_fx.frontends.seq2seq_call import MASK, Seq2SeqCall, mask_of
from lobcq_fx.graph.shared_tensors import SharingGraphModule
from lobcq_fx.tracing.calling import CallingConvention
from lobcq_fx.tracing.part import part_of
from lobcq_fx.tracing.trace import TracedModel

ENCODER, CROSS_ATTENTION, DECODER = "encoder", "cross_attention", "decoder"

TOLERANCE = 1e-3
"""Of what a part computes, which runs the operators of the whole graph on the same values."""


@dataclass(frozen=True)
class PartCall(CallingConvention):
    """Calls of a part. whole: how the graph it is a part of is called. A saved one says its kind alone."""

    whole: Seq2SeqCall

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"kind": self.kind}


class EncoderCall(PartCall):
    """The encoder's tensors in, its last hidden state [B, S, E] out."""

    kind: ClassVar[str] = ENCODER

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """As `Seq2SeqCall.encoder_tensors`."""
        return self.whole.encoder_tensors(self.whole.arguments(args, kwargs))

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the float model's encoder returns."""
        return BaseModelOutput(last_hidden_state=outputs[0])

    @property
    def arity(self) -> tuple[int, int]:
        """The encoder's tensors, and the hidden state."""
        return len(self.whole.encoder_inputs), 1


class CrossAttentionCall(PartCall):
    """The hidden state [B, S, E] in, key and value [B, H, S, D] of each cross-attention out."""

    kind: ClassVar[str] = CROSS_ATTENTION

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Of `encoder_outputs`, an output class or a tuple, the first.

        Raises:
            CallError: it is no hidden state of this model's encoder.
        """
        given = self.whole.arguments(args, kwargs)["encoder_outputs"]
        hidden = given[0] if isinstance(given, (ModelOutput, tuple, list)) else given
        width, dtype = self.whole.hidden_size, getattr(torch, self.whole.cache_dtype)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[2] != width or hidden.dtype != dtype:
            found = f"{hidden.dtype} {list(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
            raise CallError(
                f"encoder_outputs holds {found}: pass what get_encoder() gives, {dtype} [batch, length, {width}]"
            )
        return [hidden]

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keys and values of each layer in turn."""
        return list(outputs)

    @property
    def arity(self) -> tuple[int, int]:
        """The hidden state, and keys and values."""
        return 1, 2 * len(self.whole.cross_heads)


class DecoderCall(PartCall):
    """Tokens on a cache that has the cross-attention's keys and values.

    Inputs: the encoder's mask [B, S] if the graph reads one, the decoder's tensors, keys and values of the
    self-attentions, then those of the cross-attentions. Outputs: logits, and the grown ones of the self-attentions.
    """

    kind: ClassVar[str] = DECODER

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """See the class.

        Raises:
            CallError: the cache is of another model or batch, or a tensor does not fit it.
        """
        whole = self.whole
        call = whole.arguments(args, kwargs)
        decoder, states = whole.decoder_tensors(call)
        batch = decoder[0].shape[0]
        cross = states_of(call["past_key_values"].cross_attention_cache, whole.cross_heads, batch)
        mask = []
        if MASK in whole.encoder_inputs:
            mask = [mask_of(MASK, call.get(MASK), batch, cross[0].shape[2], cross[0].device)]
        whole.check_decoder(mask, decoder, states[0])
        return [*mask, *decoder, *states, *cross]

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `Seq2SeqCall.unflatten`; the encoder's hidden state is what the call brought."""
        whole = self.whole
        call = whole.arguments(args, kwargs)
        cache, given, loss = None, call.get("encoder_outputs"), whole.loss_of(outputs[0], call)
        hidden = given[0] if isinstance(given, (ModelOutput, tuple, list)) else given
        if whole.wants_cache(call):
            cache = call["past_key_values"]
            grow(cache.self_attention_cache, outputs[1:])
        return whole.output(loss, outputs[0], cache, hidden, call)

    @property
    def arity(self) -> tuple[int, int]:
        """See the class."""
        own, cross = 2 * len(self.whole.cache_heads), 2 * len(self.whole.cross_heads)
        return len(self.whole.encoder_inputs) - 1 + len(self.whole.decoder_inputs) + own + cross, 1 + own


PART_CALLS: Mapping[str, type[PartCall]] = {one.kind: one for one in (EncoderCall, CrossAttentionCall, DecoderCall)}


def parts_of(main: TracedModel) -> dict[str, TracedModel]:
    """The parts of a whole graph, on its tensors.

    Raises:
        TraceError: it cannot be taken apart.
    """
    whole, graph = main.calling, main.graph_module.graph
    assert isinstance(whole, Seq2SeqCall)
    inputs = graph.find_nodes(op="placeholder")
    results = graph.output_node().all_input_nodes
    encoder, own = len(whole.encoder_inputs), 2 * len(whole.cache_heads)
    logits_and_states, cross, hidden = results[: 1 + own], results[1 + own : -1], results[-1]
    graphs = {
        ENCODER: part_of(graph, inputs[:encoder], [hidden]),
        CROSS_ATTENTION: part_of(graph, [hidden], cross),
        DECODER: part_of(graph, [*inputs[1:], *cross], logits_and_states),
    }
    return {name: _part(main, one, PART_CALLS[name](whole)) for name, one in graphs.items()}


def check_parts(main: TracedModel, inputs: Sequence[Tensor]) -> None:
    """That the parts of a traced graph compute what it does, of its inputs.

    Raises:
        TraceError: they cannot be made, or do not.
    """
    whole, parts = main.calling, parts_of(main)
    assert isinstance(whole, Seq2SeqCall)
    encoder, own = len(whole.encoder_inputs), 2 * len(whole.cache_heads)
    outputs = main.graph_module(*inputs)
    logits_and_states, cross, hidden = outputs[: 1 + own], outputs[1 + own : -1], outputs[-1:]
    found = {
        ENCODER: (parts[ENCODER].graph_module(*inputs[:encoder]), hidden),
        CROSS_ATTENTION: (parts[CROSS_ATTENTION].graph_module(*hidden), cross),
        DECODER: (parts[DECODER].graph_module(*inputs[1:], *cross), logits_and_states),
    }
    for name, (results, expected) in found.items():
        for one, other in zip(results, expected, strict=True):
            if not torch.allclose(one.float(), other.float(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
                raise TraceError(
                    f"taken apart, the graph computes something else: its {name} depends on more than its inputs"
                )


def _part(main: TracedModel, graph: fx.Graph, calling: CallingConvention) -> TracedModel:
    return TracedModel(SharingGraphModule(main.graph_module, graph), calling)
