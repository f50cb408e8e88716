"""A model's graphs from the time they are traced until a quantized model is built of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.base import FrontEnd
from lobcq_fx.graph.aliasing import written_attributes
from lobcq_fx.inventory import Inventory
from lobcq_fx.model import ModelParts, QuantizedModel
from lobcq_fx.tracing.trace import MAIN, TracedGraphs, TracedModel
from lobcq_fx.trial import Outcome, Trial, check_quantized, differing, expected_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tried:
    """Traced graphs that were compared with their model.

    trials: the calls that they were compared on, by graph. expected: what the model is to give in each.
    unlike: why a graph besides the main one does not compute what the model does, by name.
    """

    front_end: FrontEnd
    model: nn.Module
    traced: TracedGraphs
    trials: Mapping[str, Trial]
    expected: Mapping[str, Outcome]
    unlike: dict[str, str]

    @classmethod
    def by_tracing(cls, front_end: FrontEnd, model: nn.Module, example_inputs: Any, *, static_cache: bool) -> Tried:
        """Trace a model, and compare the graphs with it: a few of many layers alike where that is enough, else all.

        Raises:
            TraceError: as `FrontEnd.trace`, and as `of`.
        """
        try:
            repeated = front_end.trace_repeated(model, static_cache=static_cache)
            if repeated is not None:
                return cls.of(front_end, model, example_inputs, repeated)
        except TraceError as error:
            logger.info("every layer of %s is traced: %s", type(model).__name__, error)
        traced = front_end.trace(model, example_inputs, static_cache=static_cache)
        return cls.of(front_end, model, example_inputs, traced)

    @classmethod
    def of(cls, front_end: FrontEnd, model: nn.Module, example_inputs: Any, traced: TracedGraphs) -> Tried:
        """Compare them.

        Raises:
            TraceError: the model itself fails on the call, or its main graph gives something else, or any graph that
                was not traced as a whole.
        """
        trials = front_end.trials(model, example_inputs, traced)
        references = {name: front_end.reference(name, traced) for name in traced.graphs}
        outcomes = {
            name: expected_of(
                model, trials[name], written_attributes(traced.graphs[name].graph_module.graph), front_end.failing
            )
            for name in dict.fromkeys(references.values())
        }
        expected = {name: outcomes[reference] for name, reference in references.items()}
        return cls(front_end, model, traced, trials, expected, differing(traced, trials, expected))

    def graphs_without(self, unlike: Mapping[str, str]) -> dict[str, fx.GraphModule]:
        """The graphs that are to go on, by name."""
        return {name: one for name, one in self.traced.graph_modules.items() if name not in unlike}

    def build(self, parts: ModelParts) -> QuantizedModel:
        """The quantized model, of which every graph was run once.

        Raises:
            LobcqError: it fails, or gives another structure, NaN or infinity where the model gives numbers.
        """
        q = self.front_end.build(parts)
        for name in self.graphs_without(parts.refused_graphs):
            of_trial = q.graphs.get(name, q.graphs[MAIN]).graph_module
            check_quantized(q, of_trial, self.trials[name], self.expected[name])
        return q

    def parts(
        self,
        emitted: Mapping[str, fx.GraphModule],
        unlike: Mapping[str, str],
        config: LobcqConfig,
        inventory: Inventory,
    ) -> ModelParts:
        """What `build` makes the model of.

        Args:
            emitted: the graphs as they are stored, by name.
            unlike: why others are not there, by name.
            config, inventory: the model's.
        """
        graphs = {name: TracedModel(one, self.traced.graphs[name].calling) for name, one in emitted.items()}
        graphs = self.front_end.graphs_of(graphs)
        configs = self.front_end.configs(self.model)
        return ModelParts(graphs, {**self.traced.refusals, **unlike}, config, inventory, **configs)
