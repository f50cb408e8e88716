"""Keys and values of a cache: what one token has in all heads, packed into one row of bytes.

A row is the token's tensor scale, fp32 in the machine's byte order, and then for each head its codes, its selectors and
its block-array scales, each as an operand of one row stores them (docs/format.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format.spec import ALLOWED_ARRAY_SIZES, FormatSpec

SCALE_BYTES = 4
"""Of a token's tensor scale."""


@dataclass(frozen=True)
class StateRows:
    """Rows of tokens whose states are [heads, width].

    spec: the format; each head starts a block array.
    """

    spec: FormatSpec
    heads: int
    width: int

    @property
    def head_parts(self) -> tuple[int, int, int]:
        """Bytes of one head's codes, selectors and scales."""
        return self.spec.code_bytes(self.width), self.spec.selector_bytes(self.width), self.spec.num_arrays(self.width)

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of a token."""
        return sum(self.head_parts)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return SCALE_BYTES + self.heads * self.head_bytes

    def join(self, codes: Tensor, selectors: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
        """Rows uint8 [B, T, row_bytes].

        Args:
            codes, selectors, scales: of states [B * heads * T, width], uint8 or float8_e4m3fn.
            tensor_scale: of each token, fp32 [B, T, 1].
        """
        batch, tokens, _ = tensor_scale.shape
        heads = torch.cat((codes, selectors, scales.view(torch.uint8)), dim=1)
        by_token = heads.view(batch, self.heads, tokens, self.head_bytes).transpose(1, 2).flatten(2)
        return torch.cat((tensor_scale.contiguous().view(torch.uint8), by_token), dim=2)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inverse of `join`, but that every head has the tensor scale of its token: fp32 [B * heads * T, 1]."""
        batch, tokens, _ = rows.shape
        tensor_scale = rows[..., :SCALE_BYTES].contiguous().view(torch.float32)
        by_token = rows[..., SCALE_BYTES:].unflatten(2, (self.heads, self.head_bytes))
        heads = by_token.transpose(1, 2).reshape(batch * self.heads * tokens, self.head_bytes)
        codes, selectors, scales = heads.split(self.head_parts, dim=1)
        return codes, selectors, scales.contiguous().view(torch.float8_e4m3fn), self.of_heads(tensor_scale)

    def of_heads(self, tensor_scale: Tensor) -> Tensor:
        """The tensor scale of each token, fp32 [B, T, 1], for each head and token: [B * heads * T, 1]."""
        return tensor_scale.unsqueeze(1).expand(-1, self.heads, -1, -1).reshape(-1, 1)


def states_spec(spec: FormatSpec, width: int) -> FormatSpec:
    """`spec` with the array size that stores a head of `width` scalars in the fewest bytes.

    Arrays are at most as long as those of `spec`; of several such sizes, the largest.
    """
    sizes = [size for size in ALLOWED_ARRAY_SIZES if size <= spec.array_size]
    candidates = [FormatSpec(spec.num_codebooks, size) for size in reversed(sizes)]
    return min(candidates, key=lambda one: one.stored_bits(1, width))
