"""Hugging Face decoder-only language models: a graph for growing caches, and one for static caches."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import TraceError
from lobcq_fx.frontends import causal_lm_trial
from lobcq_fx.frontends.base import FrontEnd
from lobcq_fx.frontends.causal_lm import QuantizedCausalLM, graph_config
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.roles import roles_of
from lobcq_fx.frontends.saved_config import config_of
from lobcq_fx.frontends.static_cache_call import STATIC_CACHE, StaticCacheCall
from lobcq_fx.frontends.transformers_trace import trace_causal_lm, trace_static_cache
from lobcq_fx.inventory import Inventory
from lobcq_fx.model import QuantizedModel
from lobcq_fx.storage.checkpoint import Checkpoint
from lobcq_fx.tracing.trace import MAIN, TracedGraphs, TracedModel
from lobcq_fx.trial import Trial

logger = logging.getLogger(__name__)


class CausalLMFrontEnd(FrontEnd):
    """A language model that generates."""

    def trace(self, model: nn.Module, example_inputs: Any, *, static_cache: bool) -> TracedGraphs:
        """No example is needed. A model without a graph for static caches is quantized all the same."""
        assert isinstance(model, PreTrainedModel)
        main = trace_causal_lm(model)
        if not static_cache:
            return TracedGraphs({MAIN: main}, {STATIC_CACHE: "quantize() was called with static_cache=False"})
        assert isinstance(main.calling, CausalLMCall)
        try:
            static = trace_static_cache(model, main.calling)
        except TraceError as error:
            logger.warning("the quantized model will refuse static caches: %s", error)
            return TracedGraphs({MAIN: main}, {STATIC_CACHE: str(error)})
        return TracedGraphs({MAIN: main, STATIC_CACHE: static})

    def trials(self, model: nn.Module, example_inputs: Any, traced: TracedGraphs) -> dict[str, Trial]:
        """A prompt and a step, on each kind of cache."""
        assert isinstance(model, PreTrainedModel)
        calling = traced.graphs[MAIN].calling
        assert isinstance(calling, CausalLMCall)
        return {MAIN: causal_lm_trial.growing(model), STATIC_CACHE: causal_lm_trial.static(model, calling)}

    def roles(self, model: nn.Module) -> Mapping[str, str]:
        """The language model's head."""
        assert isinstance(model, PreTrainedModel)
        return roles_of(model)

    def build(
        self,
        model: nn.Module,
        graphs: Mapping[str, TracedModel],
        refusals: Mapping[str, str],
        lobcq_config: LobcqConfig,
        inventory: Inventory,
    ) -> QuantizedModel:
        """A model with `generate()`."""
        assert isinstance(model, PreTrainedModel)
        q = QuantizedCausalLM(self, graphs, refusals, lobcq_config, inventory, graph_config(model.config))
        if model.generation_config is not None:
            q.generation_config = model.generation_config
        return q

    def load(self, saved: Checkpoint, directory: Path) -> QuantizedModel:
        """The same."""
        causal = CausalLMCall.from_dict(saved.calling)
        graphs = saved.traced(
            {MAIN: CausalLMCall.from_dict, STATIC_CACHE: lambda values: StaticCacheCall.from_dict(values, causal)}
        )
        config = graph_config(config_of(saved, directory))
        q = QuantizedCausalLM(self, graphs, saved.refused, saved.lobcq_config, saved.inventory, config)
        q.generation_config = GenerationConfig.from_pretrained(directory)
        return q
