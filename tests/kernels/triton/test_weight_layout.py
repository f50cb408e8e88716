"""Weights in kernel layout, and back to the bytes that are stored."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.format import FormatSpec, encode
from lobcq_fx.kernels.triton.weight_layout import CudaWeightLayout, WeightLines
from tests.format.cases import ALL_SPECS
from tests.kernels.triton.operands import DEVICE, assert_same_bits, codebooks, parts


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(1, 1), (37, 200), (16, 1100)], ids=str)
def test_unpacking_restores_every_byte(spec: FormatSpec, shape: tuple[int, int]) -> None:
    encoded = encode(torch.randn(shape), spec, codebooks(spec).cpu())
    layout = CudaWeightLayout()
    prepacked = layout.pack(parts(encoded), spec, shape[1])
    assert prepacked.dtype == torch.uint8
    assert prepacked.dim() == 1
    for one, other in zip(layout.unpack(prepacked, spec, *shape), parts(encoded), strict=True):
        assert_same_bits(one, other)
        assert one.is_contiguous()


def test_a_line_is_one_array_of_one_row() -> None:
    """Panel 1, array 2, row 16 + 5: line (1 * arrays + 2) * 16 + 5."""
    spec, shape = FormatSpec(8, 64), (40, 256)
    encoded = encode(torch.randn(shape), spec, codebooks(spec).cpu())
    lines = WeightLines.of(CudaWeightLayout().pack(parts(encoded), spec, 256), spec, *shape)
    line = (1 * 4 + 2) * 16 + 5
    assert torch.equal(lines.codes[line].view(torch.uint8).cpu(), encoded.codes[21, 64:96])
    assert torch.equal(lines.selectors[line].cpu(), encoded.selectors[21, 6:9])
    assert lines.scales[line].item() == encoded.scales.view(torch.uint8)[21, 2].item()


@pytest.mark.parametrize("spec", [s for s in ALL_SPECS if s.array_size >= 64], ids=lambda s: s.name)
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
