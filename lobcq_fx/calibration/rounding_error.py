"""How far rounding both operands of a linear moves its results, by samples of what was seen."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lobcq_fx.calibration.compensate import decoded_weight
from lobcq_fx.calibration.encode_activation import decode_activation, encode_activation
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.calibration.statistics import ActivationStatistics, scaled_sample
from lobcq_fx.format import FormatSpec, Operand, universal_codebooks
from lobcq_fx.format.spec import ENTRY_MAX, INT8_MAX

SMALLEST = torch.finfo(torch.float32).tiny
"""Divides what is 0."""


def expected_error(statistics: ActivationStatistics, weights: Iterable[tuple[Tensor, FormatSpec]], mode: str) -> float:
    """What rounding both operands costs, in the squares of a token's results: each error alone, to first order.

    Args:
        statistics: of the activation.
        weights: [N_i, K] and its format, those that are multiplied with it.
        mode: of these layers.
    """
    power, errors = sampled_power(statistics), activation_error(statistics, statistics.spec, mode)
    total = 0.0
    for weight, spec in weights:
        own, lost = weight.double().square().sum(0).cpu(), weight_error(weight, spec)
        total += float((errors[: len(own)] * own).sum() + (power[: len(own)] * lost).sum())
    return total


def weight_error(weight: Tensor, spec: FormatSpec) -> Tensor:
    """Squares of the rounding errors of a weight's columns, to the nearest: [N, K] -> fp64 [K], on the CPU."""
    codebooks = universal_codebooks(spec.num_codebooks)
    errors = weight.float() - decoded_weight(encode_weight(weight, spec, codebooks, "a weight"))
    return errors.double().square().sum(0).cpu()


def sampled_power(statistics: ActivationStatistics) -> Tensor:
    """Mean squares of an activation's columns in its sample, fp64 [Kp]."""
    return _column_means(statistics, statistics.sample())


def activation_error(statistics: ActivationStatistics, spec: FormatSpec, mode: str) -> Tensor:
    """Mean squares of the rounding errors of an activation's columns in its sample, fp64 [Kp].

    Args:
        statistics: of the activation.
        spec: the format, in arrays that those of the statistics are a multiple of.
        mode: "w4a16" rounds nothing.
    """
    values = statistics.sample()
    if mode == "w4a16":
        return _column_means(statistics, torch.zeros_like(values))
    scaled, encoded = encoded_sample(statistics, spec, mode, "per_token", universal_codebooks(spec.num_codebooks))
    # An array's own ratio of both, whatever scaled it; 0 where the array is.
    back = values.abs().amax(1, keepdim=True) / scaled.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
    return _column_means(statistics, (scaled - decode_activation(encoded)) * back)


def _column_means(statistics: ActivationStatistics, sample: Tensor) -> Tensor:
    """Mean squares of columns [Kp], of what the arrays of a sample [n, L_A] became."""
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
