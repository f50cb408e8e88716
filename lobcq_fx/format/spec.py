"""The number format's parameters: what is fixed, what may vary, and how many bits it stores.

Source: Elangovan et al., "LO-BCQ: Block Clustered Quantization for 4-bit (W4A4) LLM Inference", TMLR 2025,
arXiv 2502.05376, sections 2-3. `docs/format.md` restates the rules bit for bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BLOCK_SIZE = 8
"""Scalars that share one codebook selector (L_b in the paper)."""

CODEBOOK_SIZE = 16
"""Entries of a codebook: what a 4-bit code can address."""

CODE_BITS = 4
SCALE_BITS = 8

ENTRY_MAX = 31
"""Codebook entries are 6-bit integers in [-31, 31] (INT6, symmetric)."""

INT8_MAX = 127
"""Entries of an activation in int8 are integers in [-127, 127], symmetric."""

GRID = 16
"""Steps per unit of the fixed-point grid on which normalised scalars are compared with entries."""

GRID_MAX = 2047
"""Normalised scalars are clamped to +-2047 grid steps (12 bits with sign)."""

E4M3_MAX = 448.0
"""Largest finite value of torch.float8_e4m3fn."""

E4M3_MIN_SUBNORMAL = 2.0**-9
"""Smallest positive value of torch.float8_e4m3fn."""

TENSOR_SCALE_DIVISOR = ENTRY_MAX * E4M3_MAX
"""amax / 13888 puts the largest block-array scale at 448 and the largest scalar at entry 31."""

ALLOWED_NUM_CODEBOOKS = (1, 2, 4, 8, 16)
ALLOWED_ARRAY_SIZES = (16, 32, 64, 128)

_NAME = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class FormatSpec:
    """One LO-BCQ configuration.

    Args:
        num_codebooks: N_c, how many 16-entry codebooks a block of 8 scalars chooses from: 1, 2, 4, 8 or 16.
        array_size: L_A, how many scalars share an E4M3 scale: 16, 32, 64 or 128.

    Raises:
        ValueError: a parameter outside the allowed values.
    """

    num_codebooks: int = 8
    array_size: int = 64

    def __post_init__(self) -> None:
        if self.num_codebooks not in ALLOWED_NUM_CODEBOOKS:
            raise ValueError(f"num_codebooks={self.num_codebooks!r}: use one of {ALLOWED_NUM_CODEBOOKS}")
        if self.array_size not in ALLOWED_ARRAY_SIZES:
            raise ValueError(f"array_size={self.array_size!r}: use one of {ALLOWED_ARRAY_SIZES}")

    @classmethod
    def from_name(cls, name: str) -> FormatSpec:
        """The configuration called `"<N_c>x<L_A>"`, for example `"8x64"`.

        Raises:
            ValueError: the name does not have that form, or a number in it is not allowed.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            known = ", ".join(PAPER_CONFIGURATIONS)
            raise ValueError(f"format {name!r}: write '<codebooks>x<array size>', for example one of {known}")
        return cls(num_codebooks=int(match[1]), array_size=int(match[2]))

    @property
    def name(self) -> str:
        """`"<N_c>x<L_A>"`; the inverse of `from_name`."""
        return f"{self.num_codebooks}x{self.array_size}"

    @property
    def selector_bits(self) -> int:
        """log2(N_c), the bits of one block's codebook selector."""
        return self.num_codebooks.bit_length() - 1

    @property
    def bits_per_scalar(self) -> float:
        """4 + log2(N_c)/8 + 8/L_A: codes, selectors and scales of an unpadded operand."""
        return CODE_BITS + self.selector_bits / BLOCK_SIZE + SCALE_BITS / self.array_size

    def padded_columns(self, columns: int) -> int:
        """`columns` (K) rounded up to a multiple of the array size."""
        return -(-columns // self.array_size) * self.array_size

    def code_bytes(self, columns: int) -> int:
        """Bytes of one row's packed codes."""
        return self.padded_columns(columns) * CODE_BITS // 8

    def selector_bytes(self, columns: int) -> int:
        """Bytes of one row's packed selectors; a row starts on a byte."""
        return -(-self.padded_columns(columns) // BLOCK_SIZE * self.selector_bits // 8)

    def num_arrays(self, columns: int) -> int:
        """Block arrays, hence E4M3 scales, in one row."""
        return self.padded_columns(columns) // self.array_size

    def stored_bits(self, rows: int, columns: int, tensor_scales: int = 1) -> int:
        """Every bit stored for a [rows, columns] operand: padding and fp32 tensor scales included,
        the codebooks (shared by all tensors) not."""
        row_bytes = self.code_bytes(columns) + self.selector_bytes(columns) + self.num_arrays(columns)
        return 8 * rows * row_bytes + 32 * tensor_scales


PAPER_CONFIGURATIONS: dict[str, FormatSpec] = {
    spec.name: spec
    for spec in (
        FormatSpec(2, 128),
        FormatSpec(2, 64),
        FormatSpec(4, 64),
        FormatSpec(8, 128),
        FormatSpec(8, 64),
        FormatSpec(16, 128),
        FormatSpec(16, 64),
        FormatSpec(16, 32),
    )
}
"""The configurations evaluated in the paper, by name, in order of bits per scalar."""
