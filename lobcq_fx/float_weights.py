"""The float weights of a graph module as they are encoded: [N, K], with smoothing's scales, and rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from lobcq_fx.format import rotate
from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.plan import PlannedWeight


@dataclass(frozen=True)
class WeightScales:
    """Powers of two that a weight is multiplied with, each fp32, None for none: rows [N], columns [K].

    rotation: how many columns are rotated together then, each time; 0 for none.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    rotation: int = 0


@dataclass(frozen=True)
class FloatWeights:
    """Reads the weights of a plan from the graph module that it was made of."""

    graph_module: fx.GraphModule
    scales: Mapping[PlannedWeight, WeightScales] = field(default_factory=dict)

    def __call__(self, planned: PlannedWeight) -> Tensor:
        """The weight, [N, K] or [E, N, K]; in fp32 where it has scales, which are exact in it, or is rotated."""
        weight = rows_of(get_attribute(self.graph_module, planned.source).detach(), planned)
        scales = self.scales.get(planned, WeightScales())
        if scales.rows is not None:
            weight = weight.float() * scales.rows.to(weight.device)[:, None]
        if scales.columns is not None:
            weight = weight.float() * scales.columns.to(weight.device)
        if scales.rotation:
            weight = rotate(weight.float(), scales.rotation, "weight")
        return weight


def rows_of(attribute: Tensor, planned: PlannedWeight) -> Tensor:
    """The weight that an attribute holds, [N, K] or [E, N, K]."""
    return attribute.mT if planned.flipped else attribute
