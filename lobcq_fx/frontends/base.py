"""What a front end is: everything that one kind of model needs besides the passes, as one object."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CheckpointError
from lobcq_fx.model import ModelParts, QuantizedModel
from lobcq_fx.storage.checkpoint import Callings, Checkpoint
from lobcq_fx.tracing.trace import MAIN, TracedGraphs, TracedModel
from lobcq_fx.trial import OTHER_EXAMPLE, Trial


class FrontEnd(ABC):
    """One kind of model: how it is traced, which roles its layers have, how it is built and loaded.

    failing: remedy for a model that fails on the calls it is tried on.
    """

    failing: ClassVar[str] = OTHER_EXAMPLE

    def refusal(self, model: nn.Module, config: LobcqConfig) -> str | None:
        """Why the settings cannot be the model's, as far as that shows before it is traced; None where they can."""
        return None

    @abstractmethod
    def trace(self, model: nn.Module, example_inputs: Any, *, static_cache: bool) -> TracedGraphs:
        """Every graph of the model.

        Args:
            model: of this kind.
            example_inputs: one call, or None.
            static_cache: whether a language model gets a graph for static caches.

        Raises:
            TraceError: the model cannot be captured.
        """

    def trace_repeated(self, model: nn.Module, *, static_cache: bool) -> TracedGraphs | None:
        """The same graphs as `trace` gives without an example, of a model with many layers alike.

        Only a few are traced, and the others made of them, which a call of the model has to prove right. None where
        models of this kind are traced as a whole.

        Raises:
            TraceError: this model has to be.
        """
        return None

    def example_of(self, item: Any) -> Any:
        """What of an item of calibration data the model is traced with."""
        return item

    @abstractmethod
    def trials(self, model: nn.Module, example_inputs: Any, traced: TracedGraphs) -> dict[str, Trial]:
        """For each traced graph, calls to compare it and the quantized model with the float model on.

        Each is to give what that of its `reference` gives of the float model.
        """

    def distance(self, outputs: Sequence[Any], expected: Sequence[Any]) -> float:
        """How far results of the main graph, flat, are from the float model's: the relative square error of floats."""
        pairs = [
            (one.double(), other.double())
            for one, other in zip(outputs, expected, strict=True)
            if isinstance(one, Tensor) and one.is_floating_point()
        ]
        powers = float(sum(other.square().sum() for _, other in pairs))
        return float(sum((one - other).square().sum() for one, other in pairs)) / max(powers, sys.float_info.min)

    def reference(self, name: str, traced: TracedGraphs) -> str:
        """Name of the graph whose trial, of the float model, says what a graph is to give."""
        return MAIN

    def graphs_of(self, emitted: dict[str, TracedModel]) -> dict[str, TracedModel]:
        """The quantized model's graphs, of the emitted ones: parts of one may be graphs of their own."""
        return emitted

    def roles(self, model: nn.Module) -> Mapping[str, str]:
        """Module path -> role, for patterns such as `@head`; nothing is known of a plain module."""
        return {}

    def configs(self, model: nn.Module) -> dict[str, Any]:
        """The `config` and `generation_config` of `ModelParts`; a plain module has none."""
        return {}

    def build(self, parts: ModelParts) -> QuantizedModel:
        """The quantized model, called as the float one was."""
        return QuantizedModel(self, parts)

    def read(self, saved: Checkpoint, directory: Path) -> ModelParts:
        """The parts of a model, from a folder whose files were read already.

        Raises:
            CheckpointError: what the folder says of the model is damaged, or not known here.
        """
        try:
            configs = self.saved_configs(saved, directory)
            graphs = saved.traced(self.callings(saved))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{directory}/graph.json: the calling convention is damaged: {error}") from None
        return ModelParts(graphs, saved.refused, saved.lobcq_config, saved.inventory, **configs)

    @abstractmethod
    def callings(self, saved: Checkpoint) -> Callings:
        """What reads the calling convention of each graph that a folder may hold.

        Raises:
            KeyError, TypeError, ValueError: one is damaged.
        """

    def saved_configs(self, saved: Checkpoint, directory: Path) -> dict[str, Any]:
        """What `configs` was when the folder was written.

        Raises:
            CheckpointError: a configuration is not known here.
        """
        return {}
