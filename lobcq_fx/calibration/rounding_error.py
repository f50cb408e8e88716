"""How far rounding both operands of a linear moves its results, by samples of what was seen."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

import lobcq_fx.ops  # noqa: F401  (registers the ops that encode)
from lobcq_fx.calibration.compensate import decoded_weight
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.calibration.statistics import ActivationStatistics, scaled_sample
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.format.spec import ENTRY_MAX, INT8_MAX


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
    entry_max = INT8_MAX if mode == "w4a8" else ENTRY_MAX
    scaled = scaled_sample(statistics, "per_token", entry_max)
    values, size = statistics.sample(), statistics.spec.array_size
    # An array's own ratio of both, whatever scaled it; 0 where the array is.
    back = values.abs().amax(1, keepdim=True) / scaled.abs().amax(1, keepdim=True).clamp_min(math.ulp(0.0))
    errors = (scaled - _rounded(scaled, statistics.spec, mode)) * back
    places = statistics.sampled_places()
    arrays = statistics.spec.num_arrays(statistics.num_scalars // statistics.num_rows)
    sums = torch.zeros(2, arrays, size, dtype=torch.float64, device="cpu")
    for total, part in zip(sums, (values, errors), strict=True):
        total.index_add_(0, places, part.double().square())
    means = sums / places.bincount(minlength=arrays).clamp_min(1)[:, None]
    return means[0].flatten(), means[1].flatten()


def _rounded(sample: Tensor, spec: FormatSpec, mode: str) -> Tensor:
    """Block arrays [n, L_A], in units of their tensor scales, as a mode encodes them."""
    one = torch.ones((), dtype=torch.float32, device="cpu")
    if mode == "w4a16":
        return sample
    if mode == "w4a8":
        entries, scales, _ = torch.ops.lobcq.quantize_activation_int8(sample, spec.array_size, one)
        decoded: Tensor = entries.float() * scales.float()
        return decoded
    codebooks = universal_codebooks(spec.num_codebooks)
    codes, selectors, scales, _ = torch.ops.lobcq.quantize_activation(sample, codebooks, spec.array_size, one)
    parts = (codes, selectors, scales, one, codebooks)
    values: Tensor = torch.ops.lobcq.dequantize_weight(*parts, sample.shape[1], spec.array_size)
    return values
