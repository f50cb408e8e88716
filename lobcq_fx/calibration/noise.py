"""The noise that codebooks leave on whole operands, kept block by block so that changing one codebook is cheap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.calibration.block_sums import block_sums
from lobcq_fx.calibration.lloyd_max import squared_errors
from lobcq_fx.format.codes import to_grid
from lobcq_fx.format.scales import absmax_tensor_scale, array_scales
from lobcq_fx.format.spec import BLOCK_SIZE, GRID, GRID_MAX

SHARPNESS = 8.0
"""Of the soft maximum over operands, in 1/dB: 0 would be the mean, infinity the maximum."""


@dataclass(frozen=True)
class BlockErrors:
    """What each of some codebooks would cost each block of an operand.

    index: int64 [n, 8], grid value + GRID_MAX.
    weights: fp64 [n], so that `(errors * weights).sum()` is noise power over signal power.
    errors: fp64 [n, codebooks] in squared grid steps.
    """

    index: Tensor
    weights: Tensor
    errors: Tensor

    @classmethod
    def of(cls, arrays: Tensor, codebooks: Tensor) -> BlockErrors:
        """Errors on one operand.

        Args:
            arrays: float [n, L_A], scaled by the weight rule.
            codebooks: int8 [codebooks, 16], each row sorted ascending.
        """
        arrays = arrays.float()
        tensor_scale = absmax_tensor_scale(arrays)
        scales = array_scales(arrays, tensor_scale)
        index = to_grid(arrays.unsqueeze(0), scales.unsqueeze(0), tensor_scale).view(-1, BLOCK_SIZE) + GRID_MAX
        divisor = (scales.float() * tensor_scale).double() / GRID
        weights = divisor.square().repeat_interleave(arrays.shape[1] // BLOCK_SIZE)
        power = arrays.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        return cls(index, weights / power, block_errors(index, codebooks))

    def noise_beside(self, chosen: Sequence[int], errors: Tensor) -> Tensor:
        """Noise over signal of the `chosen` codebooks together with each candidate: errors [n, C] -> fp64 [C]."""
        if not chosen:
            return self.weights @ errors
        present = self.errors[:, list(chosen)].min(dim=1, keepdim=True).values
        return self.weights @ torch.minimum(errors, present)


def block_errors(index: Tensor, codebooks: Tensor) -> Tensor:
    """Squared error of blocks coded with each codebook: index int64 [n, 8], int8 [C, 16] -> fp64 [n, C]."""
    return block_sums(index, squared_errors(codebooks.double() * GRID))


def shortfall_db(noise: Tensor, targets: Tensor) -> Tensor:
    """Soft maximum over operands of (target - SQNR), in dB.

    Args:
        noise: fp64 [operands, candidates], noise over signal.
        targets: fp64 [operands], the SQNR wished for in dB.

    Returns:
        fp64 [candidates].
    """
    below = targets.unsqueeze(1) + 10 * noise.clamp(min=1e-30).log10()
    return (SHARPNESS * below).logsumexp(dim=0) / SHARPNESS
