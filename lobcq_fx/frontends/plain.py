"""Any nn.Module, traced on an example."""

from __future__ import annotations

from typing import Any

from torch import nn

from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.base import FrontEnd
from lobcq_fx.storage.checkpoint import Callings, Checkpoint
from lobcq_fx.tracing.calling import ModuleCall
from lobcq_fx.tracing.examples import call_of
from lobcq_fx.tracing.trace import MAIN, TracedGraphs, trace_module
from lobcq_fx.trial import Trial, call_trial


class PlainFrontEnd(FrontEnd):
    """A module of the user's own: one graph, called as in the example."""

    def trace(self, model: nn.Module, example_inputs: Any, *, static_cache: bool) -> TracedGraphs:
        """One graph, dynamic where the example's sizes allow."""
        if example_inputs is None:
            raise TraceError(f"tracing {type(model).__name__} needs example_inputs: pass the arguments of one call")
        return TracedGraphs({MAIN: trace_module(model, *call_of(example_inputs))})

    def trials(self, model: nn.Module, example_inputs: Any, traced: TracedGraphs) -> dict[str, Trial]:
        """The example."""
        return {MAIN: call_trial(*call_of(example_inputs))}

    def callings(self, saved: Checkpoint) -> Callings:
        """That of its one graph."""
        return {MAIN: ModuleCall.from_dict}
