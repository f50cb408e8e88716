"""Hugging Face encoder-decoders that generate: a graph of whole calls, and its parts, which generation runs."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lobcq_fx.config import LobcqConfig
from lobcq_fx.frontends import seq2seq_trial
from lobcq_fx.frontends.language_model import LanguageModelFrontEnd
from lobcq_fx.frontends.seq2seq_call import Seq2SeqCall
from lobcq_fx.frontends.seq2seq_lm import QuantizedSeq2SeqLM
from lobcq_fx.frontends.seq2seq_parts import PART_CALLS, parts_of
from lobcq_fx.frontends.seq2seq_trace import trace_seq2seq
from lobcq_fx.frontends.whisper import MODEL_TYPE, QuantizedWhisper
from lobcq_fx.model import ModelParts, QuantizedModel
from lobcq_fx.storage.checkpoint import Callings, Checkpoint
from lobcq_fx.tracing.examples import call_of
from lobcq_fx.tracing.trace import MAIN, TracedGraphs, TracedModel
from lobcq_fx.trial import Trial


class Seq2SeqFrontEnd(LanguageModelFrontEnd):
    """An encoder-decoder that generates."""

    def refusal(self, model: nn.Module, config: LobcqConfig) -> str | None:
        """Caches are of floats."""
        if config.kv_cache is None:
            return None
        return f"kv_cache={config.kv_cache.name!r}: encoder-decoders keep keys and values in float: leave kv_cache out"

    def trace(self, model: nn.Module, example_inputs: Any, *, static_cache: bool) -> TracedGraphs:
        """Of an example only what the encoder reads counts, where that is no tokens."""
        assert isinstance(model, PreTrainedModel)
        return TracedGraphs({MAIN: trace_seq2seq(model, _main_input(model, example_inputs))})

    def trials(self, model: nn.Module, example_inputs: Any, traced: TracedGraphs) -> dict[str, Trial]:
        """The first tokens of answers, and a step."""
        assert isinstance(model, PreTrainedModel)
        return {MAIN: seq2seq_trial.by_steps(model, _main_input(model, example_inputs))}

    def graphs_of(self, emitted: dict[str, TracedModel]) -> dict[str, TracedModel]:
        """Encoder, cross-attention and decoder beside the whole."""
        return emitted | parts_of(emitted[MAIN])

    def build(self, parts: ModelParts) -> QuantizedModel:
        """A model with `generate()`, its class's own for Whisper."""
        if parts.config.model_type == MODEL_TYPE:
            return QuantizedWhisper(self, parts)
        return QuantizedSeq2SeqLM(self, parts)

    def callings(self, saved: Checkpoint) -> Callings:
        """Those of the whole graph and of its parts, all of which are needed."""
        whole = Seq2SeqCall.from_dict(saved.calling)
        for name in PART_CALLS:
            if name not in saved.graphs or saved.graphs[name].calling.get("kind") != name:
                raise ValueError(f"the graph {name!r} of an encoder-decoder is missing")
        return {MAIN: lambda _: whole, **{name: partial(_part_call, name, whole) for name in PART_CALLS}}


def _part_call(name: str, whole: Seq2SeqCall, values: dict[str, Any]) -> Any:
    return PART_CALLS[name](whole)


def _main_input(model: PreTrainedModel, example: Any) -> Tensor | None:
    """What the encoder reads, of an example; tokens are made up."""
    if example is None or model.main_input_name == "input_ids":
        return None
    args, kwargs = call_of(example)
    value = kwargs.get(model.main_input_name, args[0] if args else None)
    return value if isinstance(value, Tensor) else None
