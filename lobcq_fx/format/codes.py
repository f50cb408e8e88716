"""Codes and selectors: steps 3 to 5 of the encoding, all integer arithmetic after the first rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format.spec import ALLOWED_NUM_CODEBOOKS, BLOCK_SIZE, CODEBOOK_SIZE, GRID, GRID_MAX

CODEBOOK_LIMIT = max(ALLOWED_NUM_CODEBOOKS)

CHUNK = 1 << 16
"""Scalars coded at a time: bounds the working memory at a few MB whatever the input's size, which caches like too."""


@dataclass(frozen=True)
class CodeTables:
    """What `assign_codes` looks up, derived from one set of codebooks; row q + GRID_MAX is of grid value q.

    nearest: uint8 [2 * GRID_MAX + 1, N_c], the nearest entry's index in each codebook, a tie to the lower index.
    costs: fp32 [2 * GRID_MAX + 1, N_c], `C * (8 * C - q)` of that entry C. It is `((q - 16 * C)**2 - q**2) / 32`, so a
        block's least sum of costs is its least sum of squared distances; an integer of at most 17 bits, so that eight
        of them add exactly in fp32.
    """

    nearest: Tensor
    costs: Tensor

    @classmethod
    def of(cls, codebooks: Tensor) -> CodeTables:
        """Tables of `codebooks` int8 [N_c, 16], each row sorted ascending; on the same device."""
        entries = codebooks.to(torch.int32)
        grid = torch.arange(-GRID_MAX, GRID_MAX + 1, device=codebooks.device, dtype=torch.int32).unsqueeze(-1)
        # argmin returns the first of equal minima.
        nearest = torch.stack([(grid - GRID * row).abs().argmin(dim=-1) for row in entries], dim=-1)
        chosen = entries.t().gather(0, nearest)  # [grid, N_c]
        return cls(nearest.to(torch.uint8), (chosen * (GRID // 2 * chosen - grid)).float())


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
    num_codebooks = tables.nearest.shape[1]
    rows = grid.reshape(-1, BLOCK_SIZE) + GRID_MAX
    if num_codebooks == 1:
        selectors = torch.zeros(rows.shape[0], dtype=torch.long, device=grid.device)
    else:
        costs = torch.nn.functional.embedding_bag(rows, tables.costs, mode="sum")
        # The codebook's number in the four lowest bits: a tie goes to the lowest, and amin is faster than argmin. The
        # result has at most 24 bits, so fp32 still holds it exactly.
        ranked = costs * CODEBOOK_LIMIT + torch.arange(num_codebooks, dtype=torch.float32, device=grid.device)
        selectors = ranked.amin(dim=-1).long() & (CODEBOOK_LIMIT - 1)
    codes = tables.nearest.flatten().take(rows * num_codebooks + selectors.unsqueeze(-1))
    return codes.view(grid.shape), selectors.to(torch.uint8).view(grid.shape[0], grid.shape[1] // BLOCK_SIZE)


def squared_errors(grid: Tensor, tables: CodeTables) -> Tensor:
    """What `assign_codes` leaves of each scalar: `(q - 16 * C)**2`, int64 [R, Kp]."""
    _, selectors = assign_codes(grid, tables)
    rows, codebook = grid.long() + GRID_MAX, selectors.long().repeat_interleave(BLOCK_SIZE, dim=1)
    costs = tables.costs.flatten().take(rows * tables.costs.shape[1] + codebook).long()
    return 2 * GRID * costs + grid.long().square()


def entries_of(codes: Tensor, selectors: Tensor, codebooks: Tensor) -> Tensor:
    """Look up codebook entries: codes uint8 [R, Kp], selectors uint8 [R, Kp/8] -> int8 [R, Kp]."""
    index = selectors.long().unsqueeze(-1) * CODEBOOK_SIZE + codes.view(*selectors.shape, BLOCK_SIZE)
    return codebooks.flatten().take(index).view(codes.shape)
