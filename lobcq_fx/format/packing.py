"""Codes and selectors packed as they are stored: the layout at rest of docs/format.md."""

from __future__ import annotations

import torch
from torch import Tensor

BITS_PER_BYTE = 8


def pack_codes(codes: Tensor) -> Tensor:
    """4-bit codes uint8 [R, Kp] -> uint8 [R, Kp/2]: scalar 2i in the low nibble, 2i+1 in the high nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """Inverse of `pack_codes`: uint8 [R, Kp/2] -> uint8 [R, Kp]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def pack_selectors(selectors: Tensor, bits: int) -> Tensor:
    """Selectors uint8 [R, B] of `bits` (0, 1, 2, 3 or 4) each -> uint8 [R, ceil(B * bits / 8)].

    Little-endian bit order: the first selector takes the lowest bits of the first byte; a selector may straddle two
    bytes (bits = 3); each row starts on a byte, its last byte filled up with zero bits.
    """
    rows, blocks = selectors.shape
    num_bytes = -(-blocks * bits // BITS_PER_BYTE)
    stream = selectors.new_zeros((rows, num_bytes * BITS_PER_BYTE))
    stream[:, : blocks * bits] = ((selectors.unsqueeze(-1) >> _positions(bits, selectors)) & 1).flatten(1)
    weighted = stream.view(rows, num_bytes, BITS_PER_BYTE) << _positions(BITS_PER_BYTE, selectors)
    return weighted.sum(dim=-1, dtype=torch.uint8)


def unpack_selectors(packed: Tensor, bits: int, blocks: int) -> Tensor:
    """Inverse of `pack_selectors`: uint8 [R, ceil(blocks * bits / 8)] -> uint8 [R, blocks]."""
    rows = packed.shape[0]
    if bits == 0:
        return packed.new_zeros((rows, blocks))
    stream = ((packed.unsqueeze(-1) >> _positions(BITS_PER_BYTE, packed)) & 1).flatten(1)
    weighted = stream[:, : blocks * bits].reshape(rows, blocks, bits) << _positions(bits, packed)
    return weighted.sum(dim=-1, dtype=torch.uint8)


def _positions(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)
