"""Encode a weight so that what rounding does to one column is made up for by the columns rounded after it.

This is GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323) inside the format, as `lobcq_fx.format.feedback` says: the
rounding of a row w to v costs (w - v) H (w - v)^T in the layer's output, H being the second moments of its input. GPTQ
feeds errors back by the Cholesky factor of H^-1. The factor R of H = R R^T, upper triangular, gives the same feedback
(QuIP, Chee et al., NeurIPS 2023, arXiv 2307.13304) with nothing inverted, so that fp32 suffices.

Whole block arrays are taken in the order of their inputs' power: the first errors find the most columns to come. A row
that feedback makes worse, measured by H as it was given, keeps its rounding to the nearest.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import lobcq_fx.ops  # noqa: F401  (registers the op that rounds)
from lobcq_fx.calibration.single_thread import single_thread
from lobcq_fx.errors import CalibrationError
from lobcq_fx.format import Encoded, FormatSpec, block_arrays
from lobcq_fx.format.packing import pack_codes, pack_selectors
from lobcq_fx.ops.dequantize_weight import decoded_weight

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: columns that always move together would take each other's errors whole."""

ROWS = 256
"""Of a matrix [K, K] that are looked at together, where a copy of it would count."""


def compensate(weight: Tensor, second_moments: Tensor, nearest: Encoded) -> Encoded:
    """Encode a weight with feedback of its rounding errors.

    Args:
        weight: [N, K], any float dtype, N and K at least 1.
        second_moments: fp32 [K, K], sums or means of x^T x over the rows x of the layer's inputs. Singular matrices are
            taken as they are. Columns that no input reached are rounded to the nearest.
        nearest: the same weight rounded to the nearest, on its device.

    Returns:
        The encoding, under the tensor scale and with the codebooks of `nearest`. No row of it costs more than that of
        `nearest` does by the second moments, up to fp32 rounding.

    Raises:
        CalibrationError: the second moments hold NaN or infinity.
    """
    if not all(bool(torch.isfinite(rows).all()) for rows in second_moments.split(ROWS)):
        raise CalibrationError("the second moments of the layer's inputs hold NaN or infinity")
    spec, columns = nearest.spec, nearest.columns
    second_moments = second_moments.to(weight.device)
    mean = float(second_moments.diagonal().double().mean()) or 1.0
    order = _order(second_moments.diagonal() / mean, spec)
    places = _columns_of(order, spec)
    coupling, power, damping = _factor(second_moments, mean, places)
    nearest_errors = weight - decoded_weight(nearest)
    codes, selectors, scales, costs = torch.ops.lobcq.compensate(
        block_arrays(weight, spec)[:, order].flatten(1),
        block_arrays(nearest_errors, spec)[:, order].flatten(1),
        coupling,
        torch.where(places < columns, power, 0.0),
        nearest.tensor_scale,
        nearest.codebooks,
        spec.array_size,
    )
    back = order.argsort()
    done = replace(
        nearest,
        codes=pack_codes(_arrays_in(back, codes)),
        selectors=pack_selectors(_arrays_in(back, selectors), spec.selector_bits),
        scales=_arrays_in(back, scales.view(torch.uint8)).view(torch.float8_e4m3fn),
    )
    squares = [errors.double().square().sum(1) for errors in (weight - decoded_weight(done), nearest_errors)]
    seen = costs - damping * torch.stack(squares, dim=1)
    return _chosen_rows(seen[:, 1] < seen[:, 0], nearest, done)


def _order(powers: Tensor, spec: FormatSpec) -> Tensor:
    """Of the block arrays, by their inputs' powers [K]."""
    padded = powers.new_zeros(spec.padded_columns(len(powers)))
    padded[: len(powers)] = powers
    return padded.view(-1, spec.array_size).sum(1).argsort(descending=True, stable=True)


def _columns_of(order: Tensor, spec: FormatSpec) -> Tensor:
    """The columns of block arrays in their order."""
    first = order[:, None] * spec.array_size
    return (first + torch.arange(spec.array_size, dtype=torch.long, device=order.device)).flatten()


@single_thread()  # the bits of the libraries' factors depend on the number of threads
def _factor(moments: Tensor, mean: float, places: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of damped moments over their mean, in another order: coupling [Kp, Kp] and power [Kp], as the op takes them.

    Besides the moments [K, K] two matrices are in memory, no more: for many columns they are the most that encoding
    takes. places: [Kp], of the columns, those from K on being padding. The third result is the damping.
    """
    damping = DAMPING
    while True:
        lower = _arranged(moments, mean, places.flip(0))
        lower.diagonal().add_(damping)
        _, failed = torch.linalg.cholesky_ex(lower, out=(lower, places.new_empty((), dtype=torch.int32)))
        if not int(failed):
            break
        damping *= 10  # fp32 did not suffice: at the latest when the identity outweighs the rest, it does
    # Upper triangular: its product with its transpose is the damped moments.
    factor = torch.empty_like(lower, memory_format=torch.contiguous_format)
    for start in range(0, len(factor), ROWS):
        rows = factor[start : start + ROWS]
        rows.copy_(lower[len(lower) - start - len(rows) : len(lower) - start].flip(0, 1))
    diagonal = factor.diagonal().clone()
    return factor.div_(diagonal), diagonal.square(), damping


def _arranged(moments: Tensor, mean: float, places: Tensor) -> Tensor:
    """Moments [K, K] over their mean, so that no square overflows, at places [Kp]; zeros in the padding.

    The columns are contiguous, as LAPACK has them.
    """
    padded, columns = len(places), len(moments)
    result = torch.empty(padded, padded, dtype=torch.float32, device=moments.device).t()
    for part, rows in zip(places.split(ROWS), result.split(ROWS), strict=True):
        taken, there = moments.new_zeros(len(part), padded, dtype=torch.float32), part < columns
        taken[there, :columns] = moments[part[there]] / mean
        rows.copy_(taken[:, places])
    return result


def _arrays_in(order: Tensor, parts: Tensor) -> Tensor:
    """[N, n], the same number of columns for each block array, with the arrays in another order."""
    arrays: Tensor = parts.unflatten(1, (len(order), -1))[:, order]
    return arrays.flatten(1)


def _chosen_rows(first: Tensor, one: Encoded, other: Encoded) -> Encoded:
    """Rows of `one` where `first` [N] says so, else of `other`."""

    def chosen(name: str) -> Tensor:
        parts = [getattr(encoded, name).view(torch.uint8) for encoded in (one, other)]
        return torch.where(first[:, None], parts[0], parts[1])

    scales = chosen("scales").view(torch.float8_e4m3fn)
    return replace(other, codes=chosen("codes"), selectors=chosen("selectors"), scales=scales)
