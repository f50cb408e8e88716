"""Attention whose two products are sums of integers: docs/format.md, "Attention in integers".

Queries are encoded as an activation in int8, and multiply the entries of keys. The weights that softmax gives to tokens
take over the scales of their values and are rounded to 7 bits, a tile of tokens and a block array of values at a time,
and multiply the entries of values. Between the two all is fp32, in an order that is fixed: a query's result depends
neither on what other queries there are nor on how many threads compute it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lobcq_fx.format.int8_activation import Int8Activation

TILE_TOKENS = 64
"""Tokens whose weights are rounded together: 0 to 63, 64 to 127, and so on."""

SUM_LANES = 16
"""Sums of weights are kept apart by the token's number modulo this, and added up at the end."""

WEIGHT_MAX = 127
"""Of a rounded weight: the largest one of a tile. Signed and unsigned bytes hold it."""

LEAST_WEIGHT = 2.0**-119
"""A tile whose weights are all below has none: 127 / weight might be beyond fp32."""


@dataclass(frozen=True)
class StateEntries:
    """Keys or values as integers and their scales (Dp: the width, filled up to block arrays).

    entries: int8 [B, H, P, Dp], any where the width is filled up.
    scales: of block arrays, fp32 [B, H, P, Dp / L_A].
    tensor_scale: of tokens, fp32 [B, P].
    width: D.
    """

    entries: Tensor
    scales: Tensor
    tensor_scale: Tensor
    width: int

    @property
    def arrays(self) -> list[tuple[Tensor, Tensor]]:
        """For each block array its entries, fp32 [B, H, P, L_A], and its scales, [B, H, P]."""
        size = self.entries.shape[-1] // self.scales.shape[-1]
        entries = self.entries.float()
        entries[..., self.width :] = 0.0
        return list(zip(entries.split(size, dim=-1), self.scales.unbind(-1), strict=True))


def attend_int8(query: Int8Activation, keys: StateEntries, values: StateEntries, added: Tensor, scale: float) -> Tensor:
    """Attention in integers, by plain torch on any device.

    Args:
        query: rows [B * Hq * T, D] in block arrays of the keys' size.
        keys, values: H heads, of which each is read by Hq / H query heads that follow one another.
        added: to the scores, fp32 [B, Hq, T, P]; -infinity where a query does not look.
        scale: of the products of queries and keys.

    Returns:
        fp32 [B, Hq, T, width of a value]; zeros for a query that looks nowhere.
    """
    heads = keys.entries.shape[1]
    shape = (added.shape[0], heads, added.shape[1] // heads, added.shape[2])
    scores = _scores(query, keys, shape, scale)
    added = added.unflatten(1, shape[1:3])
    scores = torch.where(added == -torch.inf, -torch.inf, scores + added)
    most = scores.new_full((*shape, 1), -torch.inf)
    lanes = scores.new_zeros((*shape, SUM_LANES))
    sums = [scores.new_zeros((*shape, entries.shape[-1])) for entries, _ in values.arrays]
    for token in range(0, scores.shape[-1], TILE_TOKENS):
        part = slice(token, token + TILE_TOKENS)
        tile = scores[..., part]
        tile = functional.pad(tile, (0, TILE_TOKENS - tile.shape[-1]), value=-torch.inf)
        highest = torch.maximum(most, tile.amax(-1, keepdim=True))
        looked = highest != -torch.inf
        weights = torch.where(looked, exp(tile - highest), 0.0)
        rescale = torch.where(looked, exp(most - highest), 1.0)
        first, *others = weights.split(SUM_LANES, dim=-1)
        lanes, most = lanes * rescale + sum(others, first), highest
        for index, (entries, scales) in enumerate(values.arrays):
            token_scales = (scales[..., part] * values.tensor_scale[:, None, part])[:, :, None, None]
            product = _weighted(weights[..., : token_scales.shape[-1]], token_scales, entries[:, :, None, part])
            sums[index] = sums[index] * rescale + product
    while lanes.shape[-1] > 1:
        lanes = torch.add(*lanes.chunk(2, dim=-1))
    out = torch.cat(sums, dim=-1)[..., : values.width] / torch.where(lanes == 0, 1.0, lanes)
    return out.flatten(1, 2)


def _scores(query: Int8Activation, keys: StateEntries, shape: tuple[int, ...], scale: float) -> Tensor:
    """[B, H, Hq / H, T, P]. Sums of integers are exact in fp32, in any order: at most 128 * 127 * 31 < 2^24."""
    arrays = query.scales.shape[1]
    by_array = query.entries.float().view(*shape, arrays, query.entries.shape[1] // arrays).unbind(-2)
    query_scales = query.scales.float().view(*shape, arrays, 1).unbind(-2)
    scores = torch.zeros((*shape, keys.entries.shape[2]), dtype=torch.float32, device=keys.entries.device)
    for ours, our_scale, (entries, scales) in zip(by_array, query_scales, keys.arrays, strict=True):
        dots = ours @ entries.unsqueeze(2).mT
        scores = scores + dots * (our_scale * scales[:, :, None, None])
    row_scale = query.tensor_scale.view(*shape, 1) * torch.tensor(scale, dtype=torch.float32, device=scores.device)
    return scores * keys.tensor_scale[:, None, None, None] * row_scale


def _weighted(weights: Tensor, token_scales: Tensor, entries: Tensor) -> Tensor:
    """One tile's and block array's part of the sums, [B, H, Hq / H, T, L_A].

    A value whose scale is not finite makes NaN of the sums of those that look at it, and is 0 to the others.
    """
    finite = token_scales.isfinite()
    spoiled = ((weights > 0) & ~finite).any(-1, keepdim=True)
    folded = weights * torch.where(finite, token_scales, 0.0)
    top = folded.amax(-1, keepdim=True)
    usable = top >= LEAST_WEIGHT
    rounded = (folded * torch.where(usable, WEIGHT_MAX / top, 0.0)).round()
    step = torch.where(spoiled, torch.nan, torch.where(usable, top / WEIGHT_MAX, 0.0))
    return (torch.where(usable, rounded, 0.0) @ entries) * step


_LOG2_E, _LN2_HIGH, _LN2_LOW = (float.fromhex(one) for one in ("0x1.715476p+0", "0x1.62e4p-1", "0x1.7f7d1cp-20"))
_ROUNDING = float.fromhex("0x1.8p23")
_COEFFICIENTS = [
    float.fromhex(one) for one in ("0x1.6850e4p-10", "0x1.123bccp-7", "0x1.555b98p-5", "0x1.55548ep-3", "0x1.fffff8p-2")
]
_LOWEST = -87.0


def exp(x: Tensor) -> Tensor:
    """e^x for fp32 x <= 0, to 2 units in the last place, of multiplications and additions that each round.

    2^n e^r with |r| <= ln(2) / 2. Below -87 it is 0; NaN stays NaN.
    """
    shifted = x * _LOG2_E + _ROUNDING  # the nearest integer is left in the lowest bits
    n = shifted - _ROUNDING
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    first, *others = _COEFFICIENTS
    p = r * first
    for one in others:
        p = (p + one) * r
    p = p * r + r + 1.0
    power = ((shifted.view(torch.int32) - 0x4B400000 + 127) << 23).view(torch.float32)
    return torch.where(x < _LOWEST, 0.0, p * power)
