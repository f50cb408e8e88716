"""What becomes of activations and weights before they are encoded, by what was observed: smoothing, then rotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.float_weights import FloatWeights
from lobcq_fx.observation import Observation
from lobcq_fx.plan import PlannedMatmul, QuantizationPlan
from lobcq_fx.rotation import rotate
from lobcq_fx.smoothing import smooth, smoothing_groups
from lobcq_fx.tracing.trace import MAIN


@dataclass(frozen=True)
class Prepared:
    """What is known once that is decided, for the matmuls that were observed.

    weights: reads the float weights as they are encoded. statistics: of activations as they are encoded.
    smoothed: where the divisions of smoothing went. rotated: those whose activation and weight are rotated.
    """

    weights: FloatWeights
    statistics: Mapping[PlannedMatmul, ActivationStatistics]
    smoothed: Mapping[PlannedMatmul, str]
    rotated: frozenset[PlannedMatmul]


class Preparation:
    """Decides for the graphs of a model; matmuls that are smoothed together have to be observed together."""

    def __init__(self, plan: QuantizationPlan, graph_modules: Mapping[str, fx.GraphModule]) -> None:
        """
        Args:
            plan: what is to be encoded.
            graph_modules: by name, `MAIN` among them, normalized.
        """
        self._plan, self._root = plan, graph_modules[MAIN]
        self._groups = smoothing_groups(plan, graph_modules)

    def observation(self, limit: int | None = None) -> Observation:
        """Of the main graph as it is now; `limit` as `Observation` takes it."""
        readers: dict[object, list[PlannedMatmul]] = {}
        for one in self._plan.quantized:
            readers.setdefault(one.weight, []).append(one)
        together = [(*group.matmuls, *readers.get(group.rows_of, ())) for group in self._groups]
        return Observation(self._root, self._plan, together, limit)

    def parameters_of(self, plan: QuantizationPlan) -> set[str]:
        """Names of what smoothing may change, besides planned weights, once a part of the plan was observed."""
        here = set(plan.quantized)
        groups = [group for group in self._groups if not here.isdisjoint(group.matmuls)]
        return {name for one in groups for name in (*one.parameters, *(float_ for float_, _ in one.floats))}

    def __call__(self, statistics: Mapping[PlannedMatmul, ActivationStatistics]) -> Prepared:
        """Decide. The main graph gets the parameters that smoothing has divided, and what it multiplies inputs with."""
        smoothed = smooth(self._plan, self._root, self._groups, statistics)
        rotated = rotate(self._plan, FloatWeights(self._root, smoothed.scales), smoothed.statistics)
        return Prepared(rotated.weights, rotated.statistics, smoothed.matmuls, rotated.matmuls)
