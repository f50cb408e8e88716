"""Encode one weight, or a stack of them: a tensor in, its encoding out; no graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import lobcq_fx.ops  # noqa: F401  (registers the op that encodes)
from lobcq_fx.calibration.compensate import compensate
from lobcq_fx.calibration.groups import GroupMoments
from lobcq_fx.errors import LobcqError
from lobcq_fx.format import Encoded, EncodedStack, FormatSpec


def encode_weight(
    weight: Tensor, spec: FormatSpec, codebooks: Tensor, name: str, second_moments: Tensor | None = None
) -> Encoded:
    """Round a weight to the nearest of the format under searched scales, or with feedback of its errors.

    Args:
        weight: [N, K], fp32, bf16 or fp16.
        spec: the format.
        codebooks: int8 [N_c, 16], on any device.
        name: what the error calls the weight.
        second_moments: of its layer's inputs, fp32 [K, K], where errors are to be compensated.

    Raises:
        LobcqError: the weight holds NaN or infinity (names the weight and the first bad index).
    """
    codebooks = codebooks.to(weight.device)
    try:
        parts = torch.ops.lobcq.quantize_weight.searched(weight, codebooks, spec.array_size)
    except ValueError as error:
        raise LobcqError(
            f"cannot encode {name}: {error}. Remedy: repair the checkpoint, or exclude the layer"
        ) from None
    codes, selectors, scales, tensor_scale = parts
    nearest = Encoded(codes, selectors, scales, tensor_scale, codebooks, spec, weight.shape[1])
    return compensate(weight, second_moments, nearest) if second_moments is not None and weight.numel() else nearest


def encode_stacked_weight(
    matrices: Iterable[Tensor],
    spec: FormatSpec,
    codebooks: Tensor,
    name: str,
    moments: GroupMoments | None = None,
) -> EncodedStack:
    """Encode each matrix [N, K] of a stack as `encode_weight` does, by what it meets where errors are compensated.

    Raises:
        LobcqError: a matrix holds NaN or infinity (names it and the first bad index).
    """
    encoded = []
    for index, matrix in enumerate(matrices):
        of_matrix = None if moments is None else moments.of_group(index)
        encoded.append(encode_weight(matrix, spec, codebooks, f"{name}[{index}]", of_matrix))
    return EncodedStack.of(encoded)
