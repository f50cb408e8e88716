"""Rounding to the format with feedback: each column makes up for the errors of those before it.

The rounding of a row w to v costs (w - v) H (w - v)^T, which is |(w - v) R|^2 for H = R R^T, R upper triangular. So
what column j adds to the cost is power[j] = R[j, j]^2 times the square of

    (w[j] - v[j]) + sum over i < j of (w[i] - v[i]) * coupling[i, j],     coupling[i, j] = R[i, j] / R[j, j],

which is how far v[j] is from w[j] plus that sum: the *target* that v[j] is to be nearest to. What the format adds:

- A block array gets its scale when its first column is due: of some neighbours, the one that costs least where each
  column of the array is rounded by itself.
- A block's eight columns are rounded with every codebook, each with the feedback of its own errors; the codebook whose
  columns add least to the cost wins, and only its errors go on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format.codes import CodeTables
from lobcq_fx.format.scales import array_scales, neighbour_scales
from lobcq_fx.format.spec import BLOCK_SIZE, GRID, GRID_MAX, FormatSpec


@dataclass(frozen=True)
class Rounded:
    """What became of a weight [N, K], not packed.

    codes: uint8 [N, K].
    selectors: uint8 [N, K / 8].
    scales: float8_e4m3fn [N, K / L_A].
    costs: fp64 [N, 2], of the errors of each row, and of the other errors that were to be compared.
    """

    codes: Tensor
    selectors: Tensor
    scales: Tensor
    costs: Tensor


def round_with_feedback(
    weight: Tensor,
    other_errors: Tensor,
    coupling: Tensor,
    power: Tensor,
    tensor_scale: Tensor,
    codebooks: Tensor,
    spec: FormatSpec,
) -> Rounded:
    """Round a weight column by column.

    Args:
        weight: fp32 [N, K], K a multiple of L_A.
        other_errors: fp32 [N, K], of another rounding of it, whose cost is wanted too.
        coupling: fp32 [K, K], upper triangular with ones on the diagonal.
        power: fp32 [K]; 0 for padding, which costs nothing.
        tensor_scale: fp32 [], positive.
        codebooks: int8 [N_c, 16].
        spec: the format.
    """
    rows, columns = weight.shape
    rounding = _Rounding(codebooks, tensor_scale)
    errors = torch.empty_like(weight)
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
    selectors = torch.empty((rows, columns // BLOCK_SIZE), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((rows, columns // spec.array_size), dtype=torch.float8_e4m3fn, device=weight.device)
    for begin in range(0, columns, spec.array_size):
        array = slice(begin, begin + spec.array_size)
        targets = weight[:, array] + errors[:, :begin] @ coupling[:begin, array]
        chosen = rounding.cheapest_scales(targets, power[array])
        scales[:, begin // spec.array_size] = chosen
        for first in range(0, spec.array_size, BLOCK_SIZE):
            block = slice(begin + first, begin + first + BLOCK_SIZE)
            codes[:, block], selectors[:, block.start // BLOCK_SIZE], errors[:, block] = rounding.round_block(
                weight[:, block], targets[:, first:], coupling[block, block], power[block], chosen.float()
            )
            targets[:, first + BLOCK_SIZE :] += errors[:, block] @ coupling[block, block.stop : array.stop]
    costs = [(one @ coupling).double().square() @ power.double() for one in (errors, other_errors)]
    return Rounded(codes, selectors, scales, torch.stack(costs, dim=1))


class _Rounding:
    """Rounds the columns of one block array; what it looks up is made once.

    nearest: uint8 [4095, N_c], the index of the nearest entry; entries: fp32 [4095, N_c], that entry.
    """

    def __init__(self, codebooks: Tensor, tensor_scale: Tensor) -> None:
        self.tensor_scale = tensor_scale
        self.nearest = CodeTables.of(codebooks).nearest
        self.entries = codebooks.float().t().gather(0, self.nearest.long())

    def round_block(
        self, weight: Tensor, targets: Tensor, coupling: Tensor, power: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [N, 8], selectors [N] and errors [N, 8] by the codebook whose columns add least to the cost."""
        count = self.nearest.shape[1]
        tried = targets[:, None, :BLOCK_SIZE].repeat(1, count, 1)  # [N, N_c, 8]
        errors, codes = torch.empty_like(tried), torch.empty_like(tried, dtype=torch.uint8)
        cost = torch.zeros_like(tried[:, :, 0])
        for column in range(BLOCK_SIZE):
            target = tried[:, :, column]
            codes[:, :, column], rounded = self._nearest(target, scales[:, None])
            cost += (target - rounded).square() * power[column]
            errors[:, :, column] = weight[:, column, None] - rounded
            tried[:, :, column + 1 :] += errors[:, :, column, None] * coupling[column, column + 1 :]
        selectors = cost.argmin(1)
        chosen = selectors[:, None, None].expand(-1, 1, BLOCK_SIZE)
        return codes.gather(1, chosen)[:, 0], selectors.to(torch.uint8), errors.gather(1, chosen)[:, 0]

    def cheapest_scales(self, targets: Tensor, power: Tensor) -> Tensor:
        """Of each row's array, float8_e4m3fn [N]: the cheapest if every column were rounded by itself."""
        tried = neighbour_scales(array_scales(targets, self.tensor_scale))
        best = torch.stack([self._price(targets, power, one.float()) for one in tried]).argmin(0, keepdim=True)
        scales = torch.stack([one.view(torch.uint8) for one in tried])
        return scales.gather(0, best)[0].view(torch.float8_e4m3fn)

    def _price(self, targets: Tensor, power: Tensor, scales: Tensor) -> Tensor:
        """Of scales [N], with the cheapest codebook for each block: fp32 [N]. The order of the sums is a rule."""
        _, rounded = self._nearest(targets[:, :, None], scales[:, None, None])
        prices = (targets[:, :, None] - rounded).square() * power[:, None]
        blocks = sum(prices.unflatten(1, (-1, BLOCK_SIZE)).unbind(2), start=torch.zeros_like(prices[:, :1, 0:1]))
        total: Tensor = sum(blocks.amin(-1).unbind(1), start=torch.zeros_like(scales))
        return total

    def _nearest(self, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the entries nearest to values [..., N_c or 1], one for each codebook, and what they decode to."""
        count, divisor = self.nearest.shape[1], scales * self.tensor_scale
        grid = torch.where(divisor > 0, values / divisor, 0.0) * GRID
        rows = grid.round().clamp(-GRID_MAX, GRID_MAX).long() + GRID_MAX
        places = rows * count + torch.arange(count, dtype=torch.long, device=rows.device)
        return self.nearest.flatten().take(places), self.entries.flatten().take(places) * scales * self.tensor_scale
