"""Weights in kernel layout, and back to the bytes that are stored."""

from __future__ import annotations

import itertools

import pytest
import torch

from lobcq_fx.format import FormatSpec, encode
from lobcq_fx.format.packing import unpack_selectors
from lobcq_fx.kernels.triton.weight_layout import CudaWeightLayout, WeightTiles
from tests.format.cases import EVERY_SPEC
from tests.kernels.triton.operands import DEVICE, assert_same_bits, codebooks, parts


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(3, 0), (0, 64), (0, 0), (1, 1), (37, 200), (16, 1100)], ids=str)
def test_unpacking_restores_every_byte(spec: FormatSpec, shape: tuple[int, int]) -> None:
    encoded = encode(torch.randn(shape), spec, codebooks(spec).cpu())
    layout = CudaWeightLayout()
    prepacked = layout.pack(parts(encoded), spec, shape[1])
    assert prepacked.dtype == torch.uint8
    assert prepacked.dim() == 1
    for one, other in zip(layout.unpack(prepacked, spec, *shape), parts(encoded), strict=True):
        assert_same_bits(one, other)
        assert one.is_contiguous()


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=lambda s: s.name)
def test_a_thread_has_the_blocks_that_it_multiplies(spec: FormatSpec) -> None:
    """Thread 4 g + t: rows g and g + 8, and of every 32 columns block t."""
    encoded = encode(torch.randn(40, 300), spec, codebooks(spec).cpu())
    tiles = WeightTiles.of(CudaWeightLayout().pack(parts(encoded), spec, 300), spec, 40, 300)
    panel, tile, g, t = 1, 1, 5, 2
    place = panel * 3 + tile
    codes = tiles.codes.view(9, 2, 32, 4).cpu()
    lanes = tiles.selectors.view(torch.uint8).view(9 * 32, spec.selector_bits)[
        place * 32 + 4 * g + t : place * 32 + 4 * g + t + 1
    ]
    selectors = unpack_selectors(lanes.cpu(), spec.selector_bits, 8).view(2, 2, 2)
    scales = tiles.scales.view(torch.uint8).view(9, 8, 128 // spec.array_size, 2).cpu()
    all_selectors = unpack_selectors(encoded.selectors, spec.selector_bits, spec.padded_columns(300) // 8)
    for v, half, i in itertools.product(range(2), repeat=3):
        row, block = 16 * panel + 8 * half + g, 16 * tile + 8 * v + 4 * i + t
        word = codes[place, v, 4 * g + t, 2 * half + i]
        assert torch.equal(word.view(1).view(torch.uint8), encoded.codes[row, 4 * block : 4 * block + 4])
        assert selectors[v, half, i] == all_selectors[row, block]
        array = 8 * block // spec.array_size
        scale = scales[place, g, array % (128 // spec.array_size), half]
        assert scale == encoded.scales.view(torch.uint8)[row, array]


def test_padding_has_scales_of_zero() -> None:
    spec = FormatSpec(8, 32)
    encoded = encode(torch.rand(3, 33) + 1, spec, codebooks(spec).cpu())
    scales = WeightTiles.of(CudaWeightLayout().pack(parts(encoded), spec, 33), spec, 3, 33).scales
    assert int((scales.view(torch.uint8) != 0).sum()) == 3 * 2


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=lambda s: s.name)
def test_no_larger_than_what_is_stored(spec: FormatSpec) -> None:
    encoded = encode(torch.randn(64, 512), spec, codebooks(spec).cpu())
    prepacked = CudaWeightLayout().pack(parts(encoded), spec, 512)
    assert prepacked.numel() == encoded.nbytes - encoded.tensor_scale.nbytes


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xB8, 0xFF])
def test_a_negative_or_nan_scale_is_refused(byte: int) -> None:
    spec = FormatSpec()
    encoded = encode(torch.randn(40, 300), spec, codebooks(spec).cpu())
    encoded.scales.view(torch.uint8)[17, 3] = byte
    with pytest.raises(ValueError, match=r"scales\[17, 3\] is (nan|-0.0|-1.0): a weight's are in \[0, 448\]"):
        CudaWeightLayout().pack(parts(encoded), spec, 300)


def test_it_moves_no_bytes_between_devices() -> None:
    spec = FormatSpec()
    encoded = encode(torch.randn(16, 64), spec, codebooks(spec).cpu())
    assert CudaWeightLayout().pack(parts(encoded), spec, 64).device.type == DEVICE.type
    assert CudaWeightLayout().tables(codebooks(spec)).device.type == DEVICE.type
