"""May a layer be quantized, and with which settings: pure functions of its name, role, shape, dtype and the config."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lobcq_fx.config import LobcqConfig
from lobcq_fx.format.operand import FLOAT_DTYPES


def refusal(
    layer: str, shape: Sequence[int], dtype: torch.dtype, config: LobcqConfig, role: str | None = None
) -> str | None:
    """Why a matmul with a constant weight stays in float, or None where it is to be quantized.

    Args:
        layer: module path.
        shape: of the weight; (N, K) where it is a matrix, (E, N, K) where it is a stack of them.
        dtype: of the weight.
        config: the settings for this layer, overrides applied.
        role: what the layer is to the model, for example "head"; None where it has no special role.
    """
    if len(shape) not in (2, 3):
        return "its weight is no matrix, and no stack of matrices"
    by_pattern = config.refusal(layer, role)
    if by_pattern is not None:
        return by_pattern
    columns = shape[-1]
    if columns < config.min_in_features:
        return f"too small: K = {columns} is below min_in_features = {config.min_in_features}"
    if config.activations.array_size != config.format.array_size and columns % config.format.array_size:
        return (
            f"K = {columns} is no multiple of {config.format.array_size}, the weights' arrays, which activations in"
            f" {config.activations.name} need"
        )
    return None if dtype in FLOAT_DTYPES else f"its weight is {dtype}; fp32, bf16 and fp16 are supported"
