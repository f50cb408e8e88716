"""A quantized encoder-decoder with Hugging Face's `generate()`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.seq2seq_cache import fill_cross, is_filled, new_cache
from lobcq_fx.frontends.seq2seq_call import Seq2SeqCall
from lobcq_fx.frontends.seq2seq_parts import CROSS_ATTENTION, DECODER, ENCODER
from lobcq_fx.frontends.whole_batches import WholeBatches
from lobcq_fx.model import ModelGraph, ModelParts, QuantizedModel, Reader


class Seq2SeqEncoder:
    """The encoder of a quantized encoder-decoder: what `generate()` calls once, before the first token."""

    def __init__(self, model: QuantizedSeq2SeqLM) -> None:
        self.model = model
        self.main_input_name = model.main_input_name

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The last hidden state [B, S, E], as a BaseModelOutput.

        Raises:
            CallError: the traced graph cannot serve the call.
        """
        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "input_features": input_features,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        output = self.model.run_part(ENCODER, call)
        return output if return_dict is not False else output.to_tuple()

    __call__ = forward


class QuantizedSeq2SeqLM(WholeBatches, QuantizedModel, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A `QuantizedModel` that encodes once and generates: greedy, sampling, beams, inputs padded on either side.

    It is a `PreTrainedModel` for whatever asks one for its configuration, device or cache (pipelines, generation);
    parameters, `forward`, casts and saving are `QuantizedModel`'s.
    """

    def __init__(self, front_end: Reader, parts: ModelParts) -> None:
        super().__init__(front_end, parts)
        calling = self.calling
        assert isinstance(calling, Seq2SeqCall)
        self.main_input_name = calling.main_input
        if parts.generation_config is not None:
            self.generation_config = parts.generation_config

    def _base_arguments(self, parts: ModelParts) -> tuple[Any, ...]:
        return (parts.config,)

    def get_encoder(self, modality: str | None = None) -> Seq2SeqEncoder:
        """The encoder, called as the float model's is."""
        return Seq2SeqEncoder(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        input_features: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """The logits of the decoder's next tokens, and its cache.

        Args:
            input_ids: [B, S] token ids for the encoder.
            attention_mask: [B, S], 0 at padding; None means no padding.
            decoder_input_ids: [B, T] token ids for the decoder; None shifts `labels`.
            decoder_attention_mask: [B, P + T] with P cached tokens, 0 at padding; None means no padding.
            encoder_outputs: what `get_encoder()` gave, in the place of what the encoder reads.
            past_key_values: an EncoderDecoderCache of two DynamicCaches, which grows in place; None starts a new one.
            input_features: [B, bins, frames], of models that read speech, in the place of `input_ids`.
            decoder_position_ids: [B, T], of models that take them; None counts from P on.
            labels: [B, T]; adds their cross-entropy as `loss`.
            use_cache: False leaves the cache out of the output; None does what the configuration says.
            return_dict: False returns a tuple; None does what the configuration says.
            cache: what transformers calls past_key_values from 5.24 on.
            **kwargs: what asks for nothing (False or None); what would change the result is refused.

        Returns:
            The output class of the float model, for example Seq2SeqLMOutput.

        Raises:
            CallError: the traced graphs cannot serve the call.
        """
        if cache is not None and past_key_values is not None:
            raise CallError("past_key_values and cache are two names of the same argument: pass one of them")
        if input_ids is not None and self.main_input_name != "input_ids":
            input_ids, input_features = None, input_ids  # by position
        call = {
            "input_ids": input_ids,
            "input_features": input_features,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "past_key_values": past_key_values if cache is None else cache,
            "decoder_position_ids": decoder_position_ids,
            "labels": labels,
            "use_cache": getattr(self.config, "use_cache", None) if use_cache is None else use_cache,
            "return_dict": self.config.return_dict if return_dict is None else return_dict,
            **kwargs,
        }
        return super().forward(**self._encoded(call))

    def run_part(self, name: str, call: dict[str, Any]) -> Any:
        """What one of the graphs makes of a call of the model."""
        return self._call(self.graphs[name], (), call)

    def _encoded(self, call: dict[str, Any]) -> dict[str, Any]:
        """A call whose cache has the cross-attention's keys and values, unless the whole graph serves it."""
        calling = self.calling
        assert isinstance(calling, Seq2SeqCall)
        call = calling.arguments((), call)
        cache, given = call.get("past_key_values"), call.get("encoder_outputs")
        filled = cache is not None and is_filled(cache)
        if given is None and (not filled or calling.main_input in call):
            if not filled:
                return call
            call["encoder_outputs"] = self.run_part(ENCODER, call)
        if not filled:
            call["past_key_values"] = new_cache() if cache is None else cache
            fill_cross(call["past_key_values"], self.run_part(CROSS_ATTENTION, call))
        return call

    def _serving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelGraph:
        cache = kwargs.get("past_key_values")
        return self.graphs[DECODER] if cache is not None and is_filled(cache) else super()._serving(args, kwargs)

    def _prepare_static_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, prefill_chunk_size: Any, model_kwargs: Any
    ) -> Cache:
        raise CallError(
            f"cache_implementation is {cache_implementation!r}; the decoder's graph grows its cache: leave"
            " cache_implementation out"
        )
