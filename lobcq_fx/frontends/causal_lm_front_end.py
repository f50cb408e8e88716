"""Hugging Face decoder-only language models: a graph for growing caches, and one for static caches."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import TraceError
from lobcq_fx.frontends import causal_lm_trial
from lobcq_fx.frontends.causal_lm import QuantizedCausalLM, cache_refusal
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.float_causal_lm import has_states
from lobcq_fx.frontends.language_model import LanguageModelFrontEnd
from lobcq_fx.frontends.recurrent_call import NO_STATIC_CACHE, RecurrentCall
from lobcq_fx.frontends.repeated_layers import trace_repeated
from lobcq_fx.frontends.static_cache_call import STATIC_CACHE, StaticCacheCall
from lobcq_fx.frontends.transformers_trace import trace_causal_lm, trace_static_cache
from lobcq_fx.model import ModelParts, QuantizedModel
from lobcq_fx.storage.checkpoint import Callings, Checkpoint
from lobcq_fx.tracing.trace import MAIN, TracedGraphs
from lobcq_fx.trial import Trial

logger = logging.getLogger(__name__)

NOT_WANTED = "quantize() was called with static_cache=False"


class CausalLMFrontEnd(LanguageModelFrontEnd):
    """A language model that generates."""

    def refusal(self, model: nn.Module, config: LobcqConfig) -> str | None:
        """States of a fixed size are kept in float, and all that is beside them."""
        assert isinstance(model, PreTrainedModel)
        return cache_refusal(config) if has_states(model) else None

    def trace(self, model: nn.Module, example_inputs: Any, *, static_cache: bool) -> TracedGraphs:
        """No example is needed. A model without a graph for static caches is quantized all the same."""
        assert isinstance(model, PreTrainedModel)
        main = trace_causal_lm(model)
        if not static_cache:
            return TracedGraphs({MAIN: main}, {STATIC_CACHE: NOT_WANTED})
        assert isinstance(main.calling, CausalLMCall)
        if isinstance(main.calling, RecurrentCall):
            return TracedGraphs({MAIN: main}, {STATIC_CACHE: NO_STATIC_CACHE})
        try:
            static = trace_static_cache(model, main.calling)
        except TraceError as error:
            logger.warning("the quantized model will refuse static caches: %s", error)
            return TracedGraphs({MAIN: main}, {STATIC_CACHE: str(error)})
        return TracedGraphs({MAIN: main, STATIC_CACHE: static})

    def trace_repeated(self, model: nn.Module, *, static_cache: bool) -> TracedGraphs | None:
        """Of models with many layers alike."""
        assert isinstance(model, PreTrainedModel)
        graphs = trace_repeated(model, static_cache=static_cache)
        return TracedGraphs(graphs, {} if static_cache else {STATIC_CACHE: NOT_WANTED}, repeated=True)

    def trials(self, model: nn.Module, example_inputs: Any, traced: TracedGraphs) -> dict[str, Trial]:
        """A prompt and a step, on each kind of cache."""
        assert isinstance(model, PreTrainedModel)
        calling = traced.graphs[MAIN].calling
        assert isinstance(calling, CausalLMCall)
        return {MAIN: causal_lm_trial.growing(model, calling), STATIC_CACHE: causal_lm_trial.static(model, calling)}

    def build(self, parts: ModelParts) -> QuantizedModel:
        """A model with `generate()`."""
        return QuantizedCausalLM(self, parts)

    def callings(self, saved: Checkpoint) -> Callings:
        """Those for growing and for static caches."""
        if saved.calling["kind"] == RecurrentCall.kind:
            return {MAIN: RecurrentCall.from_dict}
        causal = CausalLMCall.from_dict(saved.calling)
        return {MAIN: lambda _: causal, STATIC_CACHE: lambda values: StaticCacheCall.from_dict(values, causal)}
