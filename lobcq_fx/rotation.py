"""Rotate activations and weights within their block arrays where samples show a clearly smaller error for it.

The activation is rotated on its way into the encoder, once for all layers that read it; weights are rotated before they
are encoded, at no cost afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from lobcq_fx.calibration.rounding_error import expected_error
from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.float_weights import FloatWeights, WeightScales
from lobcq_fx.plan import PlannedMatmul, QuantizationPlan

LEAST_GAIN = 0.05
"""Of the error: what is less is not worth what it costs."""

Statistics = Mapping[PlannedMatmul, ActivationStatistics]


@dataclass(frozen=True)
class Rotated:
    """What rotation did.

    weights: reads the float weights as they are encoded. statistics: of activations as they are encoded.
    matmuls: those whose activation and weight are rotated.
    """

    weights: FloatWeights
    statistics: dict[PlannedMatmul, ActivationStatistics]
    matmuls: frozenset[PlannedMatmul]


def rotate(plan: QuantizationPlan, weights: FloatWeights, statistics: Statistics) -> Rotated:
    """Choose for each activation that the settings want rotated, by the error with and without.

    Args:
        plan: what is to be encoded.
        weights: the float ones.
        statistics: of the activations; those without any are left as they are.
    """
    as_encoded, matmuls = dict(statistics), set[PlannedMatmul]()
    reading: dict[int, list[PlannedMatmul]] = {}
    for one in plan.quantized:
        if one in statistics and statistics[one].seen:
            reading.setdefault(id(statistics[one]), []).append(one)
    times_read = plan.times_read
    scales = dict(weights.scales)
    for readers in reading.values():
        seen, read = statistics[readers[0]], [one.weight for one in readers if one.weight is not None]
        size = seen.spec.array_size
        alike = len({(one.config.activations, one.config.mode) for one in readers}) == 1
        wanted = all(one.config.rotation == "hadamard" for one in readers)
        if not (wanted and alike) or any(times_read[one] > 1 or one.columns % size for one in read):
            continue
        changed = {one: replace(scales.get(one, WeightScales()), rotation=size) for one in read}
        tried = seen.rotated(size)
        before, after = (
            expected_error(one, ((partial(of.matrices, w), w.spec) for w in read), readers[0].config.mode)
            for one, of in ((seen, weights), (tried, FloatWeights(weights.graph_module, changed)))
        )
        if after < (1 - LEAST_GAIN) * before:
            scales |= changed
            as_encoded |= dict.fromkeys(readers, tried)
            matmuls |= {*readers}
    return Rotated(FloatWeights(weights.graph_module, scales), as_encoded, frozenset(matmuls))
