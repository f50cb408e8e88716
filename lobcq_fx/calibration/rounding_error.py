"""How far rounding both operands of a linear moves its results, by samples of what was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lobcq_fx.calibration.encode_activation import decode_activation, encode_activation
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.calibration.statistics import ActivationStatistics, scaled_sample
from lobcq_fx.format import FormatSpec, Operand, universal_codebooks
from lobcq_fx.format.spec import ENTRY_MAX, INT8_MAX
from lobcq_fx.ops.dequantize_weight import decoded_weight

SMALLEST = torch.finfo(torch.float32).tiny
"""Divides what is 0."""


Matrices = Callable[[], Iterable[Tensor]]
"""Makes the matrices [N, K] of a weight, one unless it is a stack; called whenever they are needed."""


def expected_error(
    statistics: ActivationStatistics, weights: Iterable[tuple[Matrices, FormatSpec]], mode: str
) -> float:
    """What rounding both operands costs, in the squares of a token's results: each error alone, to first order.

    Args:
        statistics: of the activation.
        weights: each that it is multiplied with, and its format.
        mode: of these layers.
    """
    read = list(weights)
    lost = sum(weight_error(statistics, matrices, spec) for matrices, spec in read)
    powers = [column_power(statistics, matrices) for matrices, _ in read]
    return lost + activation_error(statistics, powers, statistics.spec, mode)


def column_power(statistics: ActivationStatistics, matrices: Matrices) -> Tensor:
    """Sums of squares of a weight's columns, fp64 [K] on the CPU: of a stack's the mean, by how many rows meet each."""
    total: Tensor | None = None
    for share, matrix in zip(statistics.shares, matrices(), strict=True):
        power = matrix.double().square().sum(0).cpu() * share
        total = power if total is None else total + power
    assert total is not None
    return total


def rounded_weight(weight: Tensor, spec: FormatSpec) -> Tensor:
    """A weight [N, K] rounded to the nearest, fp32."""
    return decoded_weight(encode_weight(weight, spec, universal_codebooks(spec.num_codebooks), "a weight"))


def weight_error(statistics: ActivationStatistics, matrices: Matrices, spec: FormatSpec) -> float:
    """The part of `expected_error` that rounding a weight costs."""
    power = _column_means(statistics, statistics.sample())
    lost = column_power(statistics, lambda: (one.float() - rounded_weight(one, spec) for one in matrices()))
    return float((power[: len(lost)] * lost).sum())


def activation_error(statistics: ActivationStatistics, weights: Iterable[Tensor], spec: FormatSpec, mode: str) -> float:
    """The part of `expected_error` that rounding an activation costs.

    Args:
        statistics: of the activation.
        weights: the `column_power` [K] of each weight that it is multiplied with.
        spec: the activation's format, in arrays that those of the statistics are a multiple of.
        mode: "w4a16" rounds nothing.
    """
    if mode == "w4a16":
        return 0.0
    scaled, encoded = encoded_sample(statistics, spec, mode, "per_token", universal_codebooks(spec.num_codebooks))
    # An array's own ratio of both, whatever scaled it; 0 where the array is.
    values = statistics.sample()
    back = values.abs().amax(1, keepdim=True) / scaled.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
    errors = _column_means(statistics, (scaled - decode_activation(encoded)) * back)
    return sum(float((errors[: len(power)] * power).sum()) for power in weights)


def _column_means(statistics: ActivationStatistics, sample: Tensor) -> Tensor:
    """Mean squares of columns, fp64 [Kp], of what the arrays of a sample [n, L_A] became."""
    spec, places = statistics.spec, statistics.sampled_places()
    arrays = spec.num_arrays(statistics.num_scalars // statistics.num_rows)
    sums = torch.zeros(arrays, spec.array_size, dtype=torch.float64, device="cpu")
    sums.index_add_(0, places, sample.double().square())
    return (sums / places.bincount(minlength=arrays).clamp_min(1)[:, None]).flatten()


def encoded_sample(
    statistics: ActivationStatistics, spec: FormatSpec, mode: str, activation_scale: str, codebooks: Tensor
) -> tuple[Tensor, Operand]:
    """An activation's sampled block arrays [n, L_A], in units of the tensor scales they would have; and encoded.

    Args:
        statistics: of the activation.
        spec: the activation's format.
        mode: `w4a4` or `w4a8`.
        activation_scale: "static" or "per_token".
        codebooks: int8 [N_c, 16], which int8 needs none of.
    """
    sample = scaled_sample(statistics, activation_scale, INT8_MAX if mode == "w4a8" else ENTRY_MAX)
    return sample, encode_activation(sample, spec, mode, codebooks, sample.new_ones(()))
