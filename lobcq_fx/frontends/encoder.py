"""Hugging Face models without a cache: text encoders, classifiers, image and speech encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lobcq_fx.frontends.base import FrontEnd
from lobcq_fx.frontends.output_types import import_output_types
from lobcq_fx.frontends.roles import roles_of
from lobcq_fx.frontends.saved_config import config_of, config_of_class
from lobcq_fx.frontends.transformers_trace import made_up_inputs, trace_pretrained, traced_flags
from lobcq_fx.storage.checkpoint import Callings, Checkpoint
from lobcq_fx.tracing.calling import ModuleCall
from lobcq_fx.tracing.examples import call_of, without_labels
from lobcq_fx.tracing.trace import MAIN, TracedGraphs
from lobcq_fx.trial import Trial, call_trial


class EncoderFrontEnd(FrontEnd):
    """One graph with dynamic batch and length, called by keyword as the original."""

    def trace(self, model: nn.Module, example_inputs: Any, *, static_cache: bool) -> TracedGraphs:
        """One graph; without an example one is made up from the configuration."""
        assert isinstance(model, PreTrainedModel)
        call = call_of(example_inputs) if example_inputs is not None else ((), None)
        return TracedGraphs({MAIN: trace_pretrained(model, *call)})

    def example_of(self, item: Any) -> Any:
        """The item without labels, which only a loss needs."""
        return without_labels(item)

    def trials(self, model: nn.Module, example_inputs: Any, traced: TracedGraphs) -> dict[str, Trial]:
        """The example, or the made-up one; the float model is called as it was traced."""
        assert isinstance(model, PreTrainedModel)
        args, kwargs = call_of(example_inputs) if example_inputs is not None else ((), made_up_inputs(model))
        plain, flagged = call_trial(args, kwargs), call_trial(args, {**kwargs, **traced_flags(model)})
        return {MAIN: lambda callee: (flagged if callee is model else plain)(callee)}

    def roles(self, model: nn.Module) -> Mapping[str, str]:
        """The heads of classifiers and masked language models."""
        assert isinstance(model, PreTrainedModel)
        return roles_of(model)

    def configs(self, model: nn.Module) -> dict[str, Any]:
        """The model's configuration."""
        return {"config": config_of_class(model)}

    def callings(self, saved: Checkpoint) -> Callings:
        """That of its one graph, once its output class is known."""
        import_output_types(str(saved.calling.get("outputs")))
        return {MAIN: ModuleCall.from_dict}

    def saved_configs(self, saved: Checkpoint, directory: Path) -> dict[str, Any]:
        """The same."""
        return {"config": config_of(saved, directory)}
