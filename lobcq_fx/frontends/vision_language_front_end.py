"""Hugging Face vision-language models: the graphs of a language model, and those of a prompt with images.

What is traced is a graph of a whole call, with which everything is planned and calibrated, and one for text alone, as
any language model has it; the first is taken apart before a quantized model is built.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lobcq_fx.errors import TraceError
from lobcq_fx.frontends import causal_lm_trial, vision_language_trial
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.causal_lm_front_end import CausalLMFrontEnd
from lobcq_fx.frontends.float_causal_lm import has_states
from lobcq_fx.frontends.generation_overrides import needs_images
from lobcq_fx.frontends.saved_config import config_of
from lobcq_fx.frontends.static_cache_call import STATIC_CACHE
from lobcq_fx.frontends.vision_language_call import ImagesCall, VisionCall, WholeCall
from lobcq_fx.frontends.vision_language_lm import QuantizedVisionLanguageLM
from lobcq_fx.frontends.vision_language_trace import parts_of, trace_vision_language
from lobcq_fx.graph.matmuls import find_matmuls, module_path
from lobcq_fx.model import ModelParts, QuantizedModel
from lobcq_fx.storage.checkpoint import Callings, Checkpoint
from lobcq_fx.tracing.trace import MAIN, TracedGraphs, TracedModel
from lobcq_fx.trial import Trial

logger = logging.getLogger(__name__)

TEXT = "text"
"""Name of the graph for text while the whole one is the main one; in a quantized model it is that."""


class VisionLanguageFrontEnd(CausalLMFrontEnd):
    """A language model that generates, and takes images."""

    def trace(self, model: nn.Module, example_inputs: Any, *, static_cache: bool) -> TracedGraphs:
        """No example is needed. A model whose images cannot be traced is quantized for text."""
        assert isinstance(model, PreTrainedModel)
        text = super().trace(model, example_inputs, static_cache=static_cache)
        causal = text.graphs[MAIN].calling
        assert isinstance(causal, CausalLMCall)
        try:
            if has_states(model):
                raise TraceError("its cache keeps states of a fixed size")
            whole = trace_vision_language(model, causal)
            optional = _only_of_images(whole, text.graphs[MAIN])
        except TraceError as error:
            if needs_images(model):
                raise
            logger.warning("the quantized model will take no images: %s", error)
            return TracedGraphs(text.graphs, {**text.refusals, ImagesCall.kind: str(error)})
        graphs = {MAIN: whole, TEXT: text.graphs.pop(MAIN), **text.graphs}
        return TracedGraphs(graphs, text.refusals, optional)

    def trace_repeated(self, model: nn.Module, *, static_cache: bool) -> TracedGraphs | None:
        """None: what images need is traced with all layers, and so is the rest."""
        return None

    def trials(self, model: nn.Module, example_inputs: Any, traced: TracedGraphs) -> dict[str, Trial]:
        """A prompt with images and a step; for the graphs for text a prompt without."""
        assert isinstance(model, PreTrainedModel)
        whole = traced.graphs[MAIN].calling
        if not isinstance(whole, WholeCall):
            return super().trials(model, example_inputs, traced)
        return {
            MAIN: vision_language_trial.with_images(model, whole.images),
            TEXT: causal_lm_trial.growing(model, whole.images),
            STATIC_CACHE: causal_lm_trial.static(model, whole.images),
        }

    def reference(self, name: str, traced: TracedGraphs) -> str:
        """Graphs for text are compared on text."""
        return TEXT if name in (TEXT, STATIC_CACHE) and TEXT in traced.graphs else MAIN

    def graphs_of(self, emitted: dict[str, TracedModel]) -> dict[str, TracedModel]:
        """The graph for text, on the whole one's tensors; the vision graph and that of the images; the others."""
        if not isinstance(emitted[MAIN].calling, WholeCall):
            return emitted
        if TEXT not in emitted:
            raise TraceError("the graph for text is not a part of the one with images, as the warnings say")
        graphs = dict(emitted)
        whole, text = graphs.pop(MAIN), graphs.pop(TEXT)
        parts = parts_of(whole.graph_module, whole.calling)
        whole.graph_module.graph = text.graph_module.graph
        return {MAIN: TracedModel(whole.graph_module, text.calling), **parts, **graphs}

    def build(self, parts: ModelParts) -> QuantizedModel:
        """A model that takes images, if it has the graphs for them."""
        return QuantizedVisionLanguageLM(self, parts) if VisionCall.kind in parts.graphs else super().build(parts)

    def callings(self, saved: Checkpoint) -> Callings:
        """Those of a language model, and of the two graphs for images, if any."""
        callings = dict(super().callings(saved))
        if VisionCall.kind not in saved.graphs:
            return callings
        causal = CausalLMCall.from_dict(saved.calling)
        vision = VisionCall.from_dict(saved.graphs[VisionCall.kind].calling, config_of(saved, Path()))
        if ImagesCall.kind not in saved.graphs:
            raise ValueError(f"the graph {ImagesCall.kind!r} of a vision-language model is missing")
        return callings | {
            VisionCall.kind: lambda _: vision,
            ImagesCall.kind: lambda values: ImagesCall.beside(values, causal, vision),
        }


def _only_of_images(whole: TracedModel, text: TracedModel) -> frozenset[str]:
    """The modules that run in the vision graph, and not in that for text.

    Raises:
        TraceError: the language model runs other matmuls with images than without.
    """
    of_images = parts_of(whole.graph_module, whole.calling)[VisionCall.kind].graph_module.graph
    only, others = (
        {module_path(node) for node in graph.nodes if node.op == "call_function"}
        for graph in (of_images, text.graph_module.graph)
    )
    only -= others
    with_images, without = (
        [module_path(matmul.node) for matmul in find_matmuls(one.graph_module)] for one in (whole, text)
    )
    if [path for path in with_images if path not in only] != without:
        raise TraceError("with images the language model runs other matmuls than without")
    return frozenset(only)
