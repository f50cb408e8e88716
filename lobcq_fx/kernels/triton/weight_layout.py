"""The layout in which the GEMM kernels read weights, for passes that prepack them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec
from lobcq_fx.format.packing import pack_selectors, unpack_selectors
from lobcq_fx.format.spec import BLOCK_SIZE, E4M3_MAX
from lobcq_fx.kernels.triton.lookup import Lookup

Parts = tuple[Tensor, Tensor, Tensor]

PANEL_ROWS = 16
"""Rows whose block arrays lie side by side: the rows of the smallest tile that an MMA instruction multiplies."""

LARGEST_SCALE = int(torch.tensor(E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8))


@dataclass(frozen=True)
class WeightLines:
    """A weight [N, K] in kernel layout. A line is one block array of one row, packed as at rest.

    Lines are ordered by panel of 16 rows, block array, row: what a program reads next is what lies next in memory, and
    all rows of a panel at once. N is rounded up to 16 with lines of zero bytes.

    codes: int32 [lines, L_A / 8], a block a word. selectors: uint8 [lines, ceil(L_A / 8 * log2(N_c) / 8)].
    scales: uint8 [lines, 1], E4M3.
    """

    codes: Tensor
    selectors: Tensor
    scales: Tensor

    @classmethod
    def of(cls, prepacked: Tensor, spec: FormatSpec, rows: int, columns: int) -> WeightLines:
        """Views of what `CudaWeightLayout.pack` made of a weight [rows, columns]."""
        lines = -(-rows // PANEL_ROWS) * PANEL_ROWS * spec.num_arrays(columns)
        widths = _line_bytes(spec)
        parts = prepacked.split([lines * width for width in widths])
        codes, selectors, scales = (part.view(lines, width) for part, width in zip(parts, widths, strict=True))
        return cls(codes.view(torch.int32), selectors, scales)


@dataclass(frozen=True)
class CudaWeightLayout:
    """Codes, selectors and scales to lines and back, on whatever device they are.

    It holds no state: models that carry it can be copied and pickled. No larger than what is stored, but for padding to
    16 rows and, where L_A is 16 or 32, of a line's selectors to bytes.
    """

    def pack(self, parts: Parts, spec: FormatSpec, columns: int) -> Tensor:
        """The weight [N, columns] in kernel layout, uint8 [bytes].

        Raises:
            ValueError: a scale that no encoder writes (names its row and block array).
        """
        codes, selectors, scales = parts
        _check_scales(scales)
        blocks = unpack_selectors(selectors, spec.selector_bits, spec.padded_columns(columns) // BLOCK_SIZE)
        array_selectors = pack_selectors(blocks.reshape(-1, spec.array_size // BLOCK_SIZE), spec.selector_bits)
        stored = (codes, array_selectors, scales.view(torch.uint8))
        shape = (codes.shape[0], spec.num_arrays(columns))
        lines = [_to_lines(part.reshape(*shape, w)) for part, w in zip(stored, _line_bytes(spec), strict=True)]
        return torch.cat(lines)

    def unpack(self, prepacked: Tensor, spec: FormatSpec, rows: int, columns: int) -> Parts:
        """Inverse of `pack`."""
        lines = WeightLines.of(prepacked, spec, rows, columns)
        arrays, array_blocks = spec.num_arrays(columns), spec.array_size // BLOCK_SIZE
        parts = (lines.codes.view(torch.uint8), lines.selectors, lines.scales)
        codes, array_selectors, scales = (_from_lines(part, rows, arrays) for part in parts)
        blocks = unpack_selectors(array_selectors.flatten(0, 1), spec.selector_bits, array_blocks)
        selectors = pack_selectors(blocks.view(rows, arrays * array_blocks), spec.selector_bits)
        return codes.flatten(1), selectors, scales.flatten(1).view(torch.float8_e4m3fn)

    def tables(self, codebooks: Tensor) -> Tensor:
        """What the kernels look up for codebooks int8 [N_c, 16], uint8 [bytes]."""
        return Lookup.of(codebooks).to_bytes()


def _line_bytes(spec: FormatSpec) -> tuple[int, int, int]:
    return spec.code_bytes(spec.array_size), spec.selector_bytes(spec.array_size), 1


def _to_lines(part: Tensor) -> Tensor:
    """uint8 [N, arrays, bytes] -> [lines * bytes]."""
    rows, arrays, width = part.shape
    padded = torch.nn.functional.pad(part, (0, 0, 0, 0, 0, -rows % PANEL_ROWS))
    panels = padded.view(padded.shape[0] // PANEL_ROWS, PANEL_ROWS, arrays, width)
    return panels.transpose(1, 2).flatten()


def _from_lines(part: Tensor, rows: int, arrays: int) -> Tensor:
    """uint8 [lines, bytes] -> [N, arrays, bytes], contiguous."""
    panels = part.view(-(-rows // PANEL_ROWS), arrays, PANEL_ROWS, part.shape[1])
    return panels.transpose(1, 2).flatten(0, 1)[:rows].contiguous()


def _check_scales(scales: Tensor) -> None:
    bad = scales.view(torch.uint8) > LARGEST_SCALE
    if bool(bad.any()):
        row, array = bad.nonzero()[0].tolist()
        value = scales[row, array].float().item()
        raise ValueError(f"scales[{row}, {array}] is {value}: a weight's are in [0, {E4M3_MAX:g}], encode it again")
