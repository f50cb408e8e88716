"""How the keys and values of a cache are stored and read: in which format, rotated or not, multiplied as what."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec
from lobcq_fx.format.rotation import RotatedOperand, rotate
from lobcq_fx.format.state_rows import StateRows, states_spec


@dataclass(frozen=True)
class CacheFormat:
    """What all caches of one kind have in common.

    spec: N_c, and the longest block arrays; heads whose width they do not divide get shorter ones, see `states_spec`.
    rotate_keys: multiply keys with a Hadamard matrix before they are encoded.
    attention: what they are multiplied as, see `LobcqConfig`.
    """

    spec: FormatSpec = field(default_factory=FormatSpec)
    rotate_keys: bool = True
    attention: str = "w4a16"

    def rows(self, heads: int, width: int) -> StateRows:
        """The layout of tokens whose states are [heads, width]."""
        return StateRows(states_spec(self.spec, width), heads, width)

    def rotation(self, width: int, operand: RotatedOperand) -> Tensor:
        """What keys are multiplied with before they are encoded ("weight"), and after ("activation").

        Also what queries are multiplied with for the same products with keys that stay rotated.

        Returns:
            fp32 [width, width] on the CPU, symmetric; blocks of the largest size up to L_A that divides the width.
        """
        return _rotation(width, math.gcd(width, self.spec.array_size), operand)


@cache
def _rotation(width: int, size: int, operand: RotatedOperand) -> Tensor:
    """Made once: a float model's layers ask for it in every call."""
    return rotate(torch.eye(width, dtype=torch.float32, device="cpu"), size, operand)
