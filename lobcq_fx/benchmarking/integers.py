"""4-bit integers in groups, as the peers' kernels want weights that somebody else has quantized."""

from __future__ import annotations

from torch import Tensor

OFFSET = 8
"""What is added to signed codes."""


def codes_and_scales(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round a weight [N, K] to integers, symmetric, the absmax of a group at 7.

    Returns:
        Codes plus OFFSET, in [0, 15], fp32 [N, K]; scales, fp32 [N, K / group].

    Raises:
        ValueError: K is no multiple of the group.
    """
    rows, columns = weight.shape
    if columns % group:
        raise ValueError(f"K = {columns} is no multiple of its group of {group}")
    groups = weight.view(rows, columns // group, group)
    scales = (groups.abs().amax(dim=2) / 7).clamp(min=1e-9)
    codes = (groups / scales.unsqueeze(2)).round().clamp(-OFFSET, OFFSET - 1) + OFFSET
    return codes.view(rows, columns), scales
