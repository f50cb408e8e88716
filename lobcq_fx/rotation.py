"""Rotate activations and weights within their block arrays where samples show a clearly smaller error for it.

The activation is multiplied with a constant matrix before it is encoded, once for all layers that read it; weights are
multiplied before they are encoded, at no cost afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from lobcq_fx.calibration.codebook_sets import MODULE
from lobcq_fx.calibration.hadamard import hadamard
from lobcq_fx.calibration.rounding_error import expected_error
from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.float_weights import FloatWeights, WeightScales
from lobcq_fx.graph.attributes import get_attribute, has_attribute, register_attribute
from lobcq_fx.plan import PlannedMatmul, PlannedWeight, QuantizationPlan

LEAST_GAIN = 0.05
"""Of the error: what is less is not worth the product that it costs."""

Statistics = Mapping[PlannedMatmul, ActivationStatistics]


@dataclass(frozen=True)
class Rotated:
    """What rotation did.

    weights: reads the float weights as they are encoded. statistics: of activations as they are encoded.
    matrices: names of what activations are multiplied with, by the matmuls that read them.
    """

    weights: FloatWeights
    statistics: dict[PlannedMatmul, ActivationStatistics]
    matrices: dict[PlannedMatmul, str] = field(default_factory=dict)


def rotate(plan: QuantizationPlan, weights: FloatWeights, statistics: Statistics) -> Rotated:
    """Choose for each activation that the settings want rotated, by the error with and without.

    Args:
        plan: what is to be encoded.
        weights: the float ones. Their graph module gets the matrices.
        statistics: of the activations; those without any are left as they are.
    """
    result = Rotated(weights, dict(statistics))
    reading: dict[int, list[PlannedMatmul]] = {}
    for one in plan.quantized:
        if one in statistics and statistics[one].seen:
            reading.setdefault(id(statistics[one]), []).append(one)
    times_read = plan.times_read
    scales = dict(weights.scales)
    for matmuls in reading.values():
        seen, read = statistics[matmuls[0]], [one.weight for one in matmuls if one.weight is not None]
        size = seen.spec.array_size
        alike = len({(one.config.activations, one.config.mode) for one in matmuls}) == 1
        wanted = all(one.config.rotation == "hadamard" for one in matmuls)
        if not (wanted and alike) or any(times_read[one] > 1 or one.shape[1] % size for one in read):
            continue
        changed = {one: replace(scales.get(one, WeightScales()), rotation=size) for one in read}
        tried = seen.rotated(size)
        before, after = (
            expected_error(one, ((float_weight(w), w.spec) for w in read), matmuls[0].config.mode)
            for one, float_weight in ((seen, weights), (tried, FloatWeights(weights.graph_module, changed)))
        )
        if after < (1 - LEAST_GAIN) * before:
            scales |= changed
            name = _matrix(weights.graph_module, read[0], size)
            for one in matmuls:
                result.statistics[one], result.matrices[one] = tried, name
    return replace(result, weights=FloatWeights(weights.graph_module, scales))


def _matrix(graph_module: fx.GraphModule, weight: PlannedWeight, size: int) -> str:
    """The name of an activation's matrix, in the dtype and on the device of a weight that reads it."""
    like, index = get_attribute(graph_module, weight.source), 0
    while True:
        name = f"{MODULE}.hadamard_{size}" + (f"_{index}" if index else "")
        if not has_attribute(graph_module, name):
            register_attribute(graph_module, name, hadamard(size, "activation").to(like))
        known = get_attribute(graph_module, name)
        if (known.dtype, known.device) == (like.dtype, like.device):
            return name
        index += 1
