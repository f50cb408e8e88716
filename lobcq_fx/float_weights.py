"""The float weights of a graph module as they are encoded: [N, K], with smoothing's scales, and rotated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from lobcq_fx.format import rotate
from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.plan import PlannedWeight


@dataclass(frozen=True)
class WeightScales:
    """Powers of two that a weight is multiplied with, each fp32, None for none: rows [N], columns [K].

    Those of a stack are for all its matrices, or [E, N] and [E, K] for each.
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
        """A weight that is no stack, [N, K]; in fp32 where it has scales, which are exact in it, or is rotated."""
        (weight,) = self.matrices(planned)
        return weight

    def matrices(self, planned: PlannedWeight) -> Iterator[Tensor]:
        """The matrices [N, K] of a stack, or the one that another weight is, made one after the other."""
        weight: Tensor = get_attribute(self.graph_module, planned.source).detach()
        for index, matrix in enumerate(matrices_of(weight, planned)):
            yield self._as_encoded(matrix, planned, index)

    def _as_encoded(self, matrix: Tensor, planned: PlannedWeight, index: int) -> Tensor:
        scales = self.scales.get(planned, WeightScales())
        if scales.rows is not None:
            matrix = matrix.float() * _of_matrix(scales.rows, index).to(matrix.device)[:, None]
        if scales.columns is not None:
            matrix = matrix.float() * _of_matrix(scales.columns, index).to(matrix.device)
        if scales.rotation:
            matrix = rotate(matrix.float(), scales.rotation, "weight")
        return matrix


def matrices_of(attribute: Tensor, planned: PlannedWeight) -> Iterator[Tensor]:
    """The matrices [N, K] of the stack that an attribute holds, or the one that another weight is."""
    for matrix in attribute if planned.stacked else [attribute]:
        yield matrix.mT if planned.flipped else matrix


def _of_matrix(scale: Tensor, index: int) -> Tensor:
    return scale[index] if scale.dim() > 1 else scale
