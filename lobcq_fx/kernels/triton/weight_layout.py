"""The layout in which the GEMM kernels read weights, for passes that prepack them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lobcq_fx.format import FormatSpec
from lobcq_fx.format.packing import pack_selectors, unpack_selectors
from lobcq_fx.format.spec import BLOCK_SIZE, CODE_BITS, E4M3_MAX
from lobcq_fx.kernels.triton.lookup import Lookup

Parts = tuple[Tensor, Tensor, Tensor]

PANEL_ROWS = 16
TILE_COLUMNS = 128
"""A tile has the rows of the smallest tile that an MMA instruction multiplies, and the columns of the largest array."""

LANES = 32
LANE_BLOCKS = PANEL_ROWS * TILE_COLUMNS // BLOCK_SIZE // LANES
"""Blocks of a tile that a thread of a warp multiplies."""

CODE_BYTES = PANEL_ROWS * TILE_COLUMNS * CODE_BITS // 8
LARGEST_SCALE = int(torch.tensor(E4M3_MAX, dtype=torch.float8_e4m3fn, device="cpu").view(torch.uint8))

SELECTOR_TYPES = {0: torch.uint8, 1: torch.uint8, 2: torch.int16, 3: torch.uint8, 4: torch.int32}
"""By bits of a selector, what a thread loads its eight as: one number, or three bytes."""

SCALE_TYPES = {1: torch.int16, 2: torch.int32, 4: torch.int32, 8: torch.int32}
"""By arrays of a tile, what a thread loads the scales of its two rows as: one number or several."""


@dataclass(frozen=True)
class WeightTiles:
    """A weight [N, K] in kernel layout: tiles of 16 rows x 128 columns, those of 16 rows one after another.

    N and K are rounded up to whole tiles with zero bytes, whose scales of zero make them contribute nothing.

    What the 32 threads of a warp multiply lies in their order, as a fragment of an MMA instruction has it: thread
    4 g + t has rows g and g + 8 and, of every 32 columns, block t. Its eight blocks are ordered by half of the columns,
    row, half of those columns.

    codes: int32 [tiles, 2, 32, 4], a block a word: half of the columns, thread, block.
    selectors: [tiles, 32, ...], log2(N_c) bytes a thread, in the types of `SELECTOR_TYPES`.
    scales: E4M3 bytes [tiles, 8, 128 / L_A, 2]: g, array, row; in the types of `SCALE_TYPES`.
    """

    codes: Tensor
    selectors: Tensor
    scales: Tensor

    @classmethod
    def of(cls, prepacked: Tensor, spec: FormatSpec, rows: int, columns: int) -> WeightTiles:
        """Views of what `CudaWeightLayout.pack` made of a weight [rows, columns]."""
        tiles = num_panels(rows) * num_tiles(columns)
        codes, selectors, scales = prepacked.split([tiles * size for size in tile_bytes(spec)])
        selector_type, scale_type = SELECTOR_TYPES[spec.selector_bits], SCALE_TYPES[TILE_COLUMNS // spec.array_size]
        return cls(codes.view(torch.int32), selectors.view(selector_type), scales.view(scale_type))


def num_panels(rows: int) -> int:
    """Tiles along N."""
    return -(-rows // PANEL_ROWS)


def num_tiles(columns: int) -> int:
    """Tiles along K."""
    return -(-columns // TILE_COLUMNS)


def tile_bytes(spec: FormatSpec) -> tuple[int, int, int]:
    """Of a tile's codes, selectors and scales."""
    return CODE_BYTES, LANES * spec.selector_bits, PANEL_ROWS * TILE_COLUMNS // spec.array_size


def weight_bytes(rows: int, columns: int, spec: FormatSpec) -> int:
    """Of a weight [rows, columns] in kernel layout."""
    return num_panels(rows) * num_tiles(columns) * sum(tile_bytes(spec))


@dataclass(frozen=True)
class CudaWeightLayout:
    """Codes, selectors and scales to tiles and back, on whatever device they are.

    It holds no state: models that carry it can be copied and pickled. No larger than what is stored, but for padding to
    16 rows and 128 columns.
    """

    stacks: ClassVar[bool] = True

    def pack(self, parts: Parts, spec: FormatSpec, columns: int) -> Tensor:
        """The weight [N, columns] in kernel layout, uint8 [bytes].

        Raises:
            ValueError: a scale that no encoder writes (names its row and block array).
        """
        codes, selectors, scales = parts
        if weight_bytes(codes.shape[0], columns, spec) == 0:
            return codes.new_empty(0)
        _check_scales(scales)
        blocks = unpack_selectors(selectors, spec.selector_bits, spec.padded_columns(columns) // BLOCK_SIZE)
        lane_selectors = _to_lanes(blocks).flatten(0, 2)
        stored = (
            _to_lanes(codes.view(torch.int32)).unflatten(-1, (2, LANE_BLOCKS // 2)).transpose(2, 3).contiguous(),
            pack_selectors(lane_selectors, spec.selector_bits),
            _scales_to_tiles(scales.view(torch.uint8), TILE_COLUMNS // spec.array_size),
        )
        return torch.cat([part.reshape(-1).view(torch.uint8) for part in stored])

    def unpack(self, prepacked: Tensor, spec: FormatSpec, rows: int, columns: int) -> Parts:
        """Inverse of `pack`."""
        if prepacked.numel() == 0:
            widths = (spec.code_bytes(columns), spec.selector_bytes(columns), spec.num_arrays(columns))
            codes, selectors, scales = (prepacked.new_empty((rows, width)) for width in widths)
            return codes, selectors, scales.view(torch.float8_e4m3fn)
        tiles = WeightTiles.of(prepacked, spec, rows, columns)
        shape = (num_panels(rows), num_tiles(columns))
        blocks = spec.padded_columns(columns) // BLOCK_SIZE
        words = tiles.codes.view(*shape, 2, LANES, LANE_BLOCKS // 2).transpose(2, 3).reshape(*shape, LANES, LANE_BLOCKS)
        packed = tiles.selectors.view(torch.uint8).view(shape[0] * shape[1] * LANES, spec.selector_bits)
        chosen = unpack_selectors(packed, spec.selector_bits, LANE_BLOCKS).view(*shape, LANES, LANE_BLOCKS)
        codes, chosen = (_from_lanes(part, rows, blocks) for part in (words, chosen))
        scales = _scales_from_tiles(
            tiles.scales.view(torch.uint8).view(*shape, tile_bytes(spec)[2]), rows, spec.num_arrays(columns)
        )
        return codes.view(torch.uint8), pack_selectors(chosen, spec.selector_bits), scales.view(torch.float8_e4m3fn)

    def tables(self, codebooks: Tensor) -> Tensor:
        """What the kernels look up for codebooks int8 [N_c, 16], uint8 [bytes]."""
        return Lookup.of(codebooks).to_bytes()


def _padded(part: Tensor, columns: int) -> Tensor:
    """[N, C] -> [N', C'], multiples of 16 and of `columns`."""
    return pad(part, (0, -part.shape[1] % columns, 0, -part.shape[0] % PANEL_ROWS))


def _to_lanes(part: Tensor) -> Tensor:
    """Something of each block [N, blocks] -> [panels, tiles, 32, 8]."""
    padded = _padded(part, TILE_COLUMNS // BLOCK_SIZE)
    # Row: half, g. Block: tile, half of the columns v, half of those i, t.
    split = padded.view(padded.shape[0] // PANEL_ROWS, 2, 8, padded.shape[1] // 16, 2, 2, 4)
    return split.permute(0, 3, 2, 6, 4, 1, 5).reshape(split.shape[0], split.shape[3], LANES, LANE_BLOCKS)


def _from_lanes(part: Tensor, rows: int, blocks: int) -> Tensor:
    """Inverse of `_to_lanes`, contiguous."""
    panels, tiles = part.shape[:2]
    split = part.view(panels, tiles, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 6, 3)
    return split.reshape(panels * PANEL_ROWS, tiles * TILE_COLUMNS // BLOCK_SIZE)[:rows, :blocks].contiguous()


def _scales_to_tiles(scales: Tensor, tile_arrays: int) -> Tensor:
    """uint8 [N, arrays] -> [panels, tiles, 8, tile_arrays, 2]."""
    padded = _padded(scales, tile_arrays)
    split = padded.view(padded.shape[0] // PANEL_ROWS, 2, 8, padded.shape[1] // tile_arrays, tile_arrays)
    return split.permute(0, 3, 2, 4, 1)


def _scales_from_tiles(scales: Tensor, rows: int, arrays: int) -> Tensor:
    """Inverse of `_scales_to_tiles`, of [panels, tiles, 16 * tile_arrays]; contiguous."""
    panels, tiles, size = scales.shape
    split = scales.view(panels, tiles, 8, size // PANEL_ROWS, 2).permute(0, 4, 2, 1, 3)
    return split.reshape(panels * PANEL_ROWS, tiles * size // PANEL_ROWS)[:rows, :arrays].contiguous()


def _check_scales(scales: Tensor) -> None:
    bad = scales.view(torch.uint8) > LARGEST_SCALE
    if bool(bad.any()):
        row, array = bad.nonzero()[0].tolist()
        value = scales[row, array].float().item()
        raise ValueError(f"scales[{row}, {array}] is {value}: a weight's are in [0, {E4M3_MAX:g}], encode it again")
