"""What the kernels look up for a set of codebooks: its entries, and for each bucket of the grid the nearest of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, check_codebooks
from lobcq_fx.format.codes import CodeTables
from lobcq_fx.format.spec import ALLOWED_NUM_CODEBOOKS, CODEBOOK_SIZE, GRID, GRID_MAX

BUCKET = GRID // 2
"""Grid steps for which the nearest entry is the same: bucket b has the grid values q with (q - 1) // 8 = b."""

FIRST_BUCKET, LAST_BUCKET = -63, 62
"""Grid values beyond these buckets have the nearest entry of the outermost ones: entries reach 31 = 62 buckets."""

NUM_BUCKETS = LAST_BUCKET - FIRST_BUCKET + 1
ENTRIES_PER_WORD = 4


@dataclass(frozen=True)
class Lookup:
    """Tables of one set of codebooks, all on the set's device.

    codebooks: int8 [N_c, 16].
    entries: int32 [126, ceil(N_c / 4)], the nearest entry of four codebooks a word, the first in its lowest byte.
    codes: uint8 [126, N_c], the indices of those entries.
    """

    codebooks: Tensor
    entries: Tensor
    codes: Tensor

    @classmethod
    def of(cls, codebooks: Tensor) -> Lookup:
        """Tables of codebooks int8 [N_c, 16].

        Raises:
            ValueError: not a set of codebooks.
        """
        num_codebooks = codebooks.shape[0]
        check_codebooks(codebooks, FormatSpec(num_codebooks))
        last_of_each = BUCKET * torch.arange(
            FIRST_BUCKET + 1, LAST_BUCKET + 2, dtype=torch.long, device=codebooks.device
        )
        codes = CodeTables.of(codebooks).nearest[last_of_each + GRID_MAX]  # [126, N_c]
        entries = codebooks.t().gather(0, codes.long())
        padded = torch.nn.functional.pad(entries, (0, -num_codebooks % ENTRIES_PER_WORD))
        return cls(codebooks.contiguous(), padded.contiguous().view(torch.int32), codes.contiguous())

    def to_bytes(self) -> Tensor:
        """One uint8 [bytes]: codebooks first, which kernels load 16 bytes at a time, then words."""
        return torch.cat([part.reshape(-1).view(torch.uint8) for part in (self.codebooks, self.entries, self.codes)])

    @classmethod
    def from_bytes(cls, data: Tensor) -> Lookup:
        """Inverse of `to_bytes`, as views.

        Raises:
            ValueError: not the size of any set's tables.
        """
        if data.numel() not in TABLE_BYTES:
            raise ValueError(f"{data.numel()} bytes are no set's look-up tables")
        n = TABLE_BYTES[data.numel()]
        codebooks, entries, codes = data.split(_part_bytes(n))
        shaped = codebooks.view(torch.int8).view(n, CODEBOOK_SIZE)
        return cls(shaped, entries.view(torch.int32).view(NUM_BUCKETS, -1), codes.view(NUM_BUCKETS, n))


def _part_bytes(num_codebooks: int) -> list[int]:
    words = -(-num_codebooks // ENTRIES_PER_WORD)
    return [CODEBOOK_SIZE * num_codebooks, 4 * NUM_BUCKETS * words, NUM_BUCKETS * num_codebooks]


TABLE_BYTES = {sum(_part_bytes(n)): n for n in ALLOWED_NUM_CODEBOOKS}
"""How many codebooks tables of so many bytes are of."""
