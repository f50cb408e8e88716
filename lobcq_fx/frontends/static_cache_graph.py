"""The graph for static caches beside a causal language model's other one, on the same packed weights."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.static_cache_call import STATIC_CACHE
from lobcq_fx.frontends.transformers_trace import trace_static_cache
from lobcq_fx.graph.shared_tensors import drop_shared, share
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from lobcq_fx.passes.follow_rewrite import FollowRewrite
from lobcq_fx.passes.infra import Sequential
from lobcq_fx.passes.normalize_matmuls import NormalizeMatmuls
from lobcq_fx.passes.share_activations import ShareActivations
from lobcq_fx.tracing.trace import TracedModel

logger = logging.getLogger(__name__)


class StaticCacheGraph:
    """Traced while the float weights are there, quantized when the first graph has been.

    variants, refused_variants: for `QuantizedModel`; the first is empty until `quantize`, or where there is no such
        graph, for which the second then has the reason.
    """

    def __init__(self, model: PreTrainedModel, first: TracedModel, wanted: bool = True) -> None:
        """Trace `model`, of which `first` is the normalized other graph. No tensor is kept that `first` has."""
        self.variants: dict[str, TracedModel] = {}
        self.refused_variants: dict[str, str] = {}
        self._first = first.graph_module
        self._traced: TracedModel | None = None
        if not wanted:
            self.refused_variants[STATIC_CACHE] = "quantize() was called with static_cache=False"
            return
        assert isinstance(first.calling, CausalLMCall)
        try:
            self._traced = trace_static_cache(model, first.calling)
        except TraceError as error:
            self._refuse(error)
            return
        NormalizeMatmuls()(self._traced.graph_module)
        drop_shared(self._traced.graph_module, self._first)

    def quantize(self, config: LobcqConfig) -> None:
        """Follow what `quantize_graph` did to the first graph; from now on both are on the tensors of that one."""
        if self._traced is None:
            return
        graph_module = share(self._traced.graph_module, self._first)
        try:
            Sequential((FollowRewrite(self._first, config), ShareActivations()))(graph_module)
        except TraceError as error:
            self._refuse(error)
            EliminateDeadCode()(self._first)
            return
        self.variants[STATIC_CACHE] = TracedModel(graph_module, self._traced.calling)

    def _refuse(self, error: TraceError) -> None:
        self.refused_variants[STATIC_CACHE] = str(error)
        logger.warning("the quantized model will refuse static caches: %s", error)
