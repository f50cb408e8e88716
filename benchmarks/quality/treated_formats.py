"""4-bit formats as operands of linears, each rounded to the nearest or compensated in the same way.

A peer's weights get what LO-BCQ's get: scales by search, and feedback of rounding errors in whole blocks, in the order
of their inputs' power, a row keeping the better of both. Written here column by column in torch for any block format;
LO-BCQ's own is the library's. Activations are rounded to the nearest under absmax scales in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.quality.peer_formats import MXFP4, NF4_BLOCKS, NVFP4, BlockFormat, int4
from lobcq_fx.calibration.compensate import DAMPING
from lobcq_fx.calibration.encode_activation import decode_activation, encode_activation
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.ops.dequantize_weight import decoded_weight

SEARCHED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""Shares of a block's largest magnitude that its scale is tried for."""


class Operand(Protocol):
    """A format that weights [N, K] and activations [..., K] are rounded to and back, fp32."""

    @property
    def bits(self) -> float:
        """Stored for each scalar, without what a whole tensor has once."""

    def weight(self, w: Tensor, second_moments: Tensor | None) -> Tensor:
        """Rounded; with second moments [K, K] of the layer's inputs, compensated."""

    def activation(self, x: Tensor) -> Tensor:
        """Rounded."""


@dataclass(frozen=True)
class LoBcq:
    """The library's own kernels."""

    spec: FormatSpec

    @property
    def bits(self) -> float:
        """Stored for each scalar."""
        return self.spec.bits_per_scalar

    def weight(self, w: Tensor, second_moments: Tensor | None) -> Tensor:
        """Under searched scales."""
        codebooks = universal_codebooks(self.spec.num_codebooks)
        return decoded_weight(encode_weight(w, self.spec, codebooks, "a weight", second_moments))

    def activation(self, x: Tensor) -> Tensor:
        """With a tensor scale for each row."""
        codebooks = universal_codebooks(self.spec.num_codebooks)
        return decode_activation(encode_activation(x.flatten(0, -2), self.spec, "w4a4", codebooks)).view(x.shape)


@dataclass(frozen=True)
class Blocks:
    """A block format of benchmarks/quality/peer_formats.py."""

    blocks: BlockFormat

    @property
    def bits(self) -> float:
        """Stored for each scalar."""
        return self.blocks.bits

    def weight(self, w: Tensor, second_moments: Tensor | None) -> Tensor:
        """Under searched scales."""
        nearest = self._searched(w.unflatten(1, (-1, self.blocks.block)), w.abs().amax())[0].flatten(1)
        return nearest if second_moments is None else self._compensated(w, second_moments, nearest)

    def activation(self, x: Tensor) -> Tensor:
        """Under absmax scales, all rows one operand."""
        return self.blocks(x.flatten(0, -2)).view(x.shape)

    def _searched(self, blocks: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks [N, n, b] rounded under the best of the scales, and these [N, n, 1]."""
        scales = torch.stack([self.blocks.scales(blocks * share, largest) for share in SEARCHED])
        rounded = torch.stack([self.blocks.rounded(blocks, one) for one in scales])
        best = (rounded - blocks).square().sum(-1, keepdim=True).argmin(0, keepdim=True)
        return rounded.gather(0, best.expand(1, *blocks.shape))[0], scales.gather(0, best)[0]

    def _compensated(self, w: Tensor, second_moments: Tensor, nearest: Tensor) -> Tensor:
        """e_j R[j, k] / R[k, k], over all columns j before k, is added to column k of w, where H = R R^T."""
        block, largest = self.blocks.block, w.abs().amax()
        power = second_moments.diagonal().view(-1, block).sum(1)
        columns = torch.arange(w.shape[1]).view(-1, block)[power.argsort(descending=True)].flatten()
        moments = second_moments[columns][:, columns] / second_moments.diagonal().mean()
        damped = moments.double().clone()
        damped.diagonal().add_(DAMPING)
        factor = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
        coupling = (factor / factor.diagonal()).to(w.dtype)
        given, result, errors = w[:, columns], torch.empty_like(w), torch.zeros_like(w)
        for start in range(0, w.shape[1], block):
            here = slice(start, start + block)
            target = given[:, here] + errors[:, :start] @ coupling[:start, here]
            scale = self._searched(target[:, None], largest)[1][:, 0]
            for k in range(start, start + block):
                fed = target[:, k - start] + errors[:, start:k] @ coupling[start:k, k]
                result[:, k] = self.blocks.rounded(fed[:, None], scale)[:, 0]
                errors[:, k] = given[:, k] - result[:, k]
        plain = given - nearest[:, columns]
        better = ((errors @ moments) * errors).sum(1) < ((plain @ moments) * plain).sum(1)
        chosen = torch.where(better[:, None], result, nearest[:, columns])
        return chosen[:, columns.argsort()]


FORMATS: dict[str, Operand] = {
    "LO-BCQ 8x64": LoBcq(FormatSpec(8, 64)),
    "LO-BCQ 16x64": LoBcq(FormatSpec(16, 64)),
    "NVFP4": Blocks(NVFP4),
    "MXFP4": Blocks(MXFP4),
    "INT4, groups of 32": Blocks(int4(32)),
    "INT4, groups of 64": Blocks(int4(64)),
    "INT4, groups of 128": Blocks(int4(128)),
    "NF4, blocks of 64": Blocks(NF4_BLOCKS),
}


def int8_activation(x: Tensor, array_size: int = 64) -> Tensor:
    """Integers in [-127, 127], one absmax scale for each array; x [..., K], K a multiple of the array."""
    arrays = x.unflatten(-1, (-1, array_size))
    scales = arrays.abs().amax(-1, keepdim=True) / 127
    return (torch.where(scales > 0, (arrays / scales).round(), 0.0) * scales).flatten(-2)


Activation = Callable[[Tensor], Tensor]
