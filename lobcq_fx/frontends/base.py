"""What a front end is: everything that one kind of model needs besides the passes, as one object."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lobcq_fx.config import LobcqConfig
from lobcq_fx.inventory import Inventory
from lobcq_fx.model import QuantizedModel
from lobcq_fx.storage.checkpoint import Checkpoint
from lobcq_fx.tracing.trace import TracedGraphs, TracedModel
from lobcq_fx.trial import Trial


class FrontEnd(ABC):
    """One kind of model: how it is traced, which roles its layers have, how it is built and loaded."""

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

    def example_of(self, item: Any) -> Any:
        """What of an item of calibration data the model is traced with."""
        return item

    @abstractmethod
    def trials(self, model: nn.Module, example_inputs: Any, traced: TracedGraphs) -> dict[str, Trial]:
        """For each graph, calls to compare it and the quantized model with the float model on.

        All of them are to give what the one for the main graph gives of the float model.
        """

    def roles(self, model: nn.Module) -> Mapping[str, str]:
        """Module path -> role, for patterns such as `@head`; nothing is known of a plain module."""
        return {}

    @abstractmethod
    def build(
        self,
        model: nn.Module,
        graphs: Mapping[str, TracedModel],
        refusals: Mapping[str, str],
        lobcq_config: LobcqConfig,
        inventory: Inventory,
    ) -> QuantizedModel:
        """The quantized model, from the emitted graphs of `model`."""

    @abstractmethod
    def load(self, saved: Checkpoint, directory: Path) -> QuantizedModel:
        """The quantized model, from a folder that was read already.

        Raises:
            CheckpointError: what the folder says of the model is damaged, or not known here.
            KeyError, TypeError, ValueError: the calling convention is damaged.
        """
