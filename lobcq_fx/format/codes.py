"""Codes and selectors: steps 3 to 5 of the encoding, all integer arithmetic after the first rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format.spec import BLOCK_SIZE, CODEBOOK_SIZE, ENTRY_MAX, GRID, GRID_MAX

BUCKET = GRID // 2
"""Midpoints of two entries are multiples of 8 grid steps, so the nearest entry is constant on (8(m-1), 8m]."""

FIRST_BUCKET = -(ENTRY_MAX * GRID // BUCKET) - 1
"""The bucket just below the lowest possible entry; every lower grid value behaves like it."""

NUM_BUCKETS = -2 * FIRST_BUCKET

CHUNK = 1 << 18
"""Scalars coded at a time: bounds the working memory at about 30 MB whatever the input's size."""


@dataclass(frozen=True)
class CodeTables:
    """What `assign_codes` looks up, derived from one set of codebooks.

    nearest: uint8 [N_c, NUM_BUCKETS], the nearest entry's index in each codebook, a tie to the lower index.
    errors: fp64 [2 * GRID_MAX + 1, N_c], squared distance in grid steps from each grid value to the nearest entry.
        Integers below 2**53, hence exactly summable in any order.
    """

    nearest: Tensor
    errors: Tensor

    @classmethod
    def of(cls, codebooks: Tensor) -> CodeTables:
        """Tables of `codebooks` int8 [N_c, 16], each row sorted ascending; on the same device."""
        entries = codebooks.to(torch.int32) * GRID
        upper = torch.arange(FIRST_BUCKET, FIRST_BUCKET + NUM_BUCKETS, device=codebooks.device) * BUCKET + BUCKET
        distance = (upper.to(torch.int32).view(1, -1, 1) - entries.unsqueeze(1)).abs()  # [N_c, NUM_BUCKETS, 16]
        # argmin returns the first of equal minima; the upper end of a bucket is where a tie can be.
        nearest = distance.argmin(dim=-1).to(torch.uint8)
        grid = torch.arange(-GRID_MAX, GRID_MAX + 1, device=codebooks.device, dtype=torch.int32)
        chosen = entries.gather(1, nearest[:, _bucket_of(grid)].long())  # [N_c, grid]
        return cls(nearest, (grid - chosen).double().square().t().contiguous())


def to_grid(arrays: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """Normalise to the fixed-point grid.

    Args:
        arrays: fp32 [R, G, L_A].
        scales: float8_e4m3fn [R, G].
        tensor_scale: fp32, broadcastable to [R, G].

    Returns:
        int32 [R, G, L_A] in [-2047, 2047]: `rint(16 * x / (scale * tensor_scale))`; 0 where that divisor is 0 or NaN.
    """
    divisor = (scales.float() * tensor_scale).unsqueeze(-1)
    usable = (divisor != 0) & ~divisor.isnan()
    normalised = torch.where(usable, arrays / divisor, 0.0)
    return (normalised * GRID).round().clamp(-GRID_MAX, GRID_MAX).to(torch.int32)


def assign_codes(grid: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor]:
    """Choose each block's codebook and each scalar's entry.

    Args:
        grid: int32 [R, Kp] from `to_grid`, Kp a multiple of 8.
        tables: of the codebooks to choose from.

    Returns:
        codes uint8 [R, Kp] and selectors uint8 [R, Kp/8]. The selector is the codebook with the least sum of squared
        distances over the block, a tie to the lowest; the code its nearest entry, a tie to the lower index.
    """
    num_codebooks = tables.nearest.shape[0]
    blocks = grid.reshape(-1, BLOCK_SIZE)
    if num_codebooks == 1:
        selectors = torch.zeros(blocks.shape[0], dtype=torch.long, device=grid.device)
    else:
        errors = torch.nn.functional.embedding_bag(blocks + GRID_MAX, tables.errors, mode="sum")
        selectors = errors.argmin(dim=-1)
    index = selectors.unsqueeze(-1) * NUM_BUCKETS + _bucket_of(blocks)
    codes = tables.nearest.flatten().take(index)
    return codes.view(grid.shape), selectors.to(torch.uint8).view(grid.shape[0], grid.shape[1] // BLOCK_SIZE)


def entries_of(codes: Tensor, selectors: Tensor, codebooks: Tensor) -> Tensor:
    """Look up codebook entries: codes uint8 [R, Kp], selectors uint8 [R, Kp/8] -> int8 [R, Kp]."""
    index = selectors.long().unsqueeze(-1) * CODEBOOK_SIZE + codes.view(*selectors.shape, BLOCK_SIZE)
    return codebooks.flatten().take(index).view(codes.shape)


def _bucket_of(grid: Tensor) -> Tensor:
    """Row of the nearest-entry table for each grid value (int64)."""
    return (((grid - 1) >> 3).clamp(FIRST_BUCKET, FIRST_BUCKET + NUM_BUCKETS - 1) - FIRST_BUCKET).long()
