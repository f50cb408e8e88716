"""How far rounding both operands of a linear moves its results, by samples of what was seen."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lobcq_fx.calibration.compensate import decoded_weight
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.calibration.statistics import ActivationStatistics, scaled_sample
from lobcq_fx.format import FormatSpec, Operand, decode, encode, encode_int8, universal_codebooks
from lobcq_fx.format.spec import INT8_MAX


def expected_error(statistics: ActivationStatistics, weights: Iterable[tuple[Tensor, FormatSpec]], mode: str) -> float:
    """What rounding both operands costs, in the squares of a token's results: each error alone, to first order.

    Args:
        statistics: of the activation.
        weights: [N_i, K] and its format, those that are multiplied with it.
        mode: of these layers.
    """
    power, errors = _by_column(statistics, mode)
    total = 0.0
    for weight, spec in weights:
        codebooks = universal_codebooks(spec.num_codebooks)
        rounding = weight.float() - decoded_weight(encode_weight(weight, spec, codebooks, "a weight"))
        own, lost = (part.double().square().sum(0).cpu() for part in (weight, rounding))
        total += float((errors[: len(own)] * own).sum() + (power[: len(own)] * lost).sum())
    return total


def _by_column(statistics: ActivationStatistics, mode: str) -> tuple[Tensor, Tensor]:
    """Mean squares of an activation's columns and of their rounding errors in its sample, fp64 [Kp] each."""
    values, spec = statistics.sample(), statistics.spec
    errors = torch.zeros_like(values)
    if mode != "w4a16":
        scaled, encoded = encoded_sample(statistics, spec, mode, "per_token", universal_codebooks(spec.num_codebooks))
        # An array's own ratio of both, whatever scaled it; 0 where the array is.
        back = values.abs().amax(1, keepdim=True) / scaled.abs().amax(1, keepdim=True).clamp_min(math.ulp(0.0))
        errors = (scaled - decode(encoded)) * back
    places = statistics.sampled_places()
    arrays = spec.num_arrays(statistics.num_scalars // statistics.num_rows)
    sums = torch.zeros(2, arrays, spec.array_size, dtype=torch.float64, device="cpu")
    for total, part in zip(sums, (values, errors), strict=True):
        total.index_add_(0, places, part.double().square())
    means = sums / places.bincount(minlength=arrays).clamp_min(1)[:, None]
    return means[0].flatten(), means[1].flatten()


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
    if mode == "w4a8":
        sample = scaled_sample(statistics, activation_scale, INT8_MAX)
        return sample, encode_int8(sample, spec.array_size, sample.new_ones(()))
    sample = scaled_sample(statistics, activation_scale)
    return sample, encode(sample, spec, codebooks, sample.new_ones(()))
