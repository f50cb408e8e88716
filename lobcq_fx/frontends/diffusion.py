"""Models of diffusers, which a pipeline calls once a step, and reads the configuration of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from diffusers.configuration_utils import FrozenDict
from diffusers.models import modeling_outputs  # noqa: F401  (output classes register themselves, which folders name)
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.base import FrontEnd
from lobcq_fx.model import ModelParts, QuantizedModel
from lobcq_fx.storage.checkpoint import Callings, Checkpoint
from lobcq_fx.tracing.calling import ModuleCall
from lobcq_fx.tracing.examples import call_of
from lobcq_fx.tracing.trace import MAIN, TracedGraphs, TracedModel, trace_module
from lobcq_fx.trial import Trial, call_trial

RETURN_DICT = "return_dict"


@dataclass(frozen=True)
class DiffusionCall(ModuleCall):
    """Calls of a model of diffusers, which asks for an output class or a tuple, and may pass empty dictionaries."""

    kind: ClassVar[str] = "diffusion"

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors among the arguments, in traced order."""
        return super().flatten(args, _without_form(kwargs))

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output class, or with `return_dict=False` a tuple of what it holds."""
        result = super().unflatten(outputs, args, kwargs)
        by_name = kwargs.get(RETURN_DICT, True) or not isinstance(result, Mapping)
        return result if by_name else tuple(result.values())


class DiffusionConfig(FrozenDict):  # type: ignore[misc]
    """A configuration as diffusers reads it, which is asked for its content as one of transformers is."""

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        return dict(self)

    def to_json_string(self, use_diff: bool = True) -> str:
        """The same."""
        return json.dumps(self.to_dict())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it beside an exported model."""
        (Path(folder) / "config.json").write_text(f"{self.to_json_string()}\n", encoding="utf-8")


class QuantizedDiffusionModel(QuantizedModel):
    """A `QuantizedModel` in the place of the float one in a pipeline, which asks for `config`, `dtype` and `device`."""

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """Where a pipeline says for which prompt it calls: nothing is kept from step to step."""
        return nullcontext()


class DiffusionFrontEnd(FrontEnd):
    """One graph, dynamic where the example's sizes allow, called as the original."""

    def trace(self, model: nn.Module, example_inputs: Any, *, static_cache: bool) -> TracedGraphs:
        """One graph.

        Raises:
            TraceError: without an example, or where the model cannot be captured.
        """
        args, kwargs = _call(model, example_inputs)
        traced = trace_module(model, args, kwargs)
        assert isinstance(traced.calling, ModuleCall)
        settings = {one.name: getattr(traced.calling, one.name) for one in fields(ModuleCall)}
        return TracedGraphs({MAIN: TracedModel(traced.graph_module, DiffusionCall(**settings))})

    def trials(self, model: nn.Module, example_inputs: Any, traced: TracedGraphs) -> dict[str, Trial]:
        """The example."""
        return {MAIN: call_trial(*_call(model, example_inputs))}

    def configs(self, model: nn.Module) -> dict[str, Any]:
        """The model's configuration, with its class."""
        assert isinstance(model, ModelMixin)
        values = json.loads(model.to_json_string())
        return {"config": DiffusionConfig({**values, "architectures": [type(model).__name__]})}

    def build(self, parts: ModelParts) -> QuantizedDiffusionModel:
        """Called as the model is, by a pipeline too."""
        return QuantizedDiffusionModel(self, parts)

    def callings(self, saved: Checkpoint) -> Callings:
        """That of its one graph."""
        return {MAIN: DiffusionCall.from_dict}

    def saved_configs(self, saved: Checkpoint, directory: Path) -> dict[str, Any]:
        """The same, without the dtype, which the model itself has."""
        values = {name: value for name, value in (saved.config or {}).items() if name != "dtype"}
        return {"config": DiffusionConfig(values)}


def _call(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as a call that asks for the output class."""
    if example_inputs is None:
        raise TraceError(f"tracing {type(model).__name__} needs example_inputs: pass the arguments of one step")
    args, kwargs = call_of(example_inputs)
    return args, _without_form(kwargs)


def _without_form(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without those that change nothing but the form of the result, or nothing at all."""
    return {name: value for name, value in kwargs.items() if name != RETURN_DICT and not _is_empty(value)}


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping) and not value
