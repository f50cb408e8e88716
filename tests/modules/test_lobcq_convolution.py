"""A convolution on a packed weight: what torch's computes on the decoded one, and images that it does not take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.errors import OperandError
from lobcq_fx.format import FormatSpec, decode, universal_codebooks
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.modules.lobcq_convolution import LobcqConvolution
from lobcq_fx.modules.packed_product import LinearSettings
from lobcq_fx.modules.packed_weight import PARTS
from lobcq_fx.modules.windows import Windows

SPEC = FormatSpec(8, 64)
CASES = {
    "conv1d": (nn.Conv1d(24, 10, 1), (2, 24, 7)),
    "patches": (nn.Conv2d(3, 10, 4, 4), (2, 3, 9, 12)),
    "patches without a bias, of one image": (nn.Conv2d(3, 10, (2, 4), (3, 4), bias=False), (3, 9, 12)),
    "conv3d": (nn.Conv3d(3, 10, 2, 2), (1, 3, 4, 4, 6)),
}


def packed(convolution):
    """With content, and the float convolution's weight decoded from it."""
    settings, codebooks = LinearSettings(SPEC, "w4a16", SPEC), universal_codebooks(SPEC.num_codebooks)
    matrix = convolution.weight.detach().flatten(1)
    encoded = encode_weight(matrix, SPEC, codebooks, "w")
    convolution.weight.data = decode(encoded).view_as(convolution.weight)
    bias = None if convolution.bias is None else nn.Parameter(convolution.bias.detach(), requires_grad=False)
    windows = Windows(convolution.kernel_size, convolution.stride)
    one = LobcqConvolution(
        tuple(matrix.shape), bias, settings, weight_layout, windows, dtype=torch.float32, device=torch.device("cpu")
    )
    for part in PARTS:
        setattr(one.weight, part, getattr(encoded, part))
    one.codebooks = codebooks
    return one


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_torch_does_on_the_decoded_weight(case):
    convolution, shape = CASES[case]
    one, x = packed(convolution), torch.randn(*shape)
    torch.testing.assert_close(one(x), convolution(x), rtol=1e-5, atol=1e-5)
    one.prepack()
    for image in (x, x.transpose(-1, -2).contiguous().transpose(-1, -2)):
        torch.testing.assert_close(one(image), convolution(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 2, 3, 8, 8), (8, 8)])
def test_what_is_no_image_of_its_channels_is_refused(shape):
    one = packed(nn.Conv2d(3, 10, 4, 4))
    with pytest.raises(OperandError, match=r"x is \[.*\]: the layer takes \[B, 3, any, any\], or one without B"):
        one(torch.randn(*shape))


def test_its_weight_has_the_dtype_of_images_and_follows_casts():
    one = packed(nn.Conv2d(3, 10, 4, 4))
    assert one.weight.dtype == torch.float32
    assert one.bfloat16().weight.dtype == torch.bfloat16
    assert one.weight.codes.dtype == torch.uint8
    assert "windows=(4, 4), steps=(4, 4)" in repr(one)
