"""Other 4-bit formats, for comparison: a few lines each, checked against torchao where that is installed.

Each function rounds x fp32 [R, K] to the format and back. `PEERS` lists them with the bits they store a scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitudes of a 4-bit float (OCP Microscaling Formats specification 1.0, table 3)."""

NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
"""Quantiles of a normal distribution (Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E)."""


@dataclass(frozen=True)
class BlockFormat:
    """A format of codes with one scale for each block of a row.

    block: scalars that share a scale. scale_bits: of one.
    levels: x in units of its scale, rounded to what the codes stand for.
    scales: of blocks [R, n, block] of an operand, whose largest magnitude is given, [R, n, 1]; as they are stored.
    """

    block: int
    scale_bits: int
    levels: Callable[[Tensor], Tensor]
    scales: Callable[[Tensor, Tensor], Tensor]

    @property
    def bits(self) -> float:
        """Stored for each scalar, an fp32 scale of a whole tensor not counted."""
        return 4 + self.scale_bits / self.block

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, K] rounded, K a multiple of the block."""
        blocks = x.unflatten(-1, (-1, self.block))
        return self.rounded(blocks, self.scales(blocks, x.abs().amax())).flatten(-2)

    def rounded(self, x: Tensor, scales: Tensor) -> Tensor:
        """x to the nearest under scales that broadcast with it; 0 where they are 0."""
        return self.levels(x / torch.where(scales == 0, 1.0, scales)) * scales


def _nvfp4_scales(blocks: Tensor, largest: Tensor) -> Tensor:
    tensor_scale = largest / (448 * 6)
    scales = blocks.abs().amax(dim=-1, keepdim=True) / 6 / tensor_scale
    return scales.clamp(torch.finfo(torch.float8_e4m3fn).tiny, 448).to(torch.float8_e4m3fn).float() * tensor_scale


def _mxfp4_scales(blocks: Tensor, _largest: Tensor) -> Tensor:
    return torch.exp2(blocks.abs().amax(dim=-1, keepdim=True).log2().floor() - 2)


def _int4_scales(blocks: Tensor, _largest: Tensor) -> Tensor:
    return (blocks.abs().amax(dim=-1, keepdim=True) / 7.5).bfloat16().float()


def _round_to_e2m1(x: Tensor) -> Tensor:
    """To the nearest 4-bit float, ties to the even code, saturating at 6."""
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    below = torch.bucketize(x.abs(), middles)  # on a tie: the lower of the two codes
    tie_up = (x.abs() == middles[below.clamp(max=6)]) & (below % 2 == 1)
    return E2M1[below + tie_up] * x.sign()


def _round_to_nf4(x: Tensor) -> Tensor:
    """To the nearest normal-float level; x in units of its block's largest magnitude."""
    return NF4[torch.bucketize(x, (NF4[1:] + NF4[:-1]) / 2)]


def int4(block: int) -> BlockFormat:
    """Symmetric integers in [-8, 7] in groups that share a bf16 scale, absmax / 7.5."""
    return BlockFormat(block, 16, lambda x: x.round().clamp(-8, 7), _int4_scales)


NVFP4 = BlockFormat(16, 8, _round_to_e2m1, _nvfp4_scales)
"""E2M1 in blocks of 16 with an E4M3 scale each and one fp32 scale for the tensor.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149, section 2.
"""

MXFP4 = BlockFormat(32, 8, _round_to_e2m1, _mxfp4_scales)
"""E2M1 in blocks of 32 that share a power of two.

Source: OCP Microscaling Formats specification 1.0, section 6.3.
"""


NF4_BLOCKS = BlockFormat(
    64,
    16,
    _round_to_nf4,
    lambda blocks, _largest: blocks.abs().amax(dim=-1, keepdim=True).bfloat16().float(),
)
"""Normal-float codes in blocks of 64 with a bf16 absmax scale each: `nf4` without double quantization, which takes its
scales from a whole weight before the first column is rounded."""


def int4_asymmetric(x: Tensor, group: int) -> Tensor:
    """Integers in [0, 15] in groups that share a bf16 scale and a 4-bit zero point."""
    groups = x.unflatten(-1, (-1, group))
    low = groups.amin(dim=-1, keepdim=True).clamp(max=0)
    high = groups.amax(dim=-1, keepdim=True).clamp(min=0)
    scales = ((high - low) / 15).bfloat16().float()
    zero = (-low / scales).round().clamp(0, 15)
    return (((groups / scales).round() + zero).clamp(0, 15).sub(zero) * scales).flatten(-2)


NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Stored for each scalar."""


def nf4(x: Tensor) -> Tensor:
    """Normal-float codes in blocks of 64; absmax scales, less their mean, as int8 in groups of 256.

    Source: as for `NF4`, section 3, "double quantization". The number of scalars is a multiple of 64.
    """
    blocks = x.reshape(-1, 64)
    scales = blocks.abs().amax(dim=-1)
    mean = scales.mean()
    groups = torch.nn.functional.pad(scales - mean, (0, -len(scales) % 256)).view(-1, 256)
    step = groups.abs().amax(dim=-1, keepdim=True) / 128
    stored = ((groups / step).round().clamp(-128, 127) * step).flatten()[: len(scales)] + mean
    return (_round_to_nf4(blocks / scales.unsqueeze(-1)) * stored.unsqueeze(-1)).view(x.shape)


@dataclass(frozen=True)
class Peer:
    """A format to compare with.

    bits: stored per scalar, codes and scales, fp32 scales of a whole tensor not counted.
    ours: round trip by this file.
    theirs: the same by torchao.
    """

    name: str
    bits: float
    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor]


def _torchao_mxfp4(x: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    return MXTensor.to_mx(x, torch.float4_e2m1fn_x2, block_size=32).dequantize(x.dtype)


def _torchao_nvfp4(x: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().amax())).dequantize(x.dtype)


def _torchao_int4(x: Tensor, group: int, symmetric: bool) -> Tensor:
    from torchao.quantization import quant_primitives as primitives

    mapping = primitives.MappingType.SYMMETRIC if symmetric else primitives.MappingType.ASYMMETRIC
    lowest, highest = (-8, 7) if symmetric else (0, 15)
    container = torch.int8 if symmetric else torch.uint8
    block = (1, group)
    scale, zero = primitives.choose_qparams_affine(
        x, mapping, block, container, lowest, highest, scale_dtype=torch.bfloat16, zero_point_dtype=torch.int32
    )
    codes = primitives.quantize_affine(x, block, scale.float(), zero, container, lowest, highest)
    return primitives.dequantize_affine(
        codes, block, scale.float(), zero, container, lowest, highest, output_dtype=x.dtype
    )


def _torchao_nf4(x: Tensor) -> Tensor:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    return to_nf4(x, block_size=64, scaler_block_size=256).get_original_weight()


PEERS = (
    Peer("MXFP4", MXFP4.bits, MXFP4, _torchao_mxfp4),
    Peer("NVFP4", NVFP4.bits, NVFP4, _torchao_nvfp4),
    Peer("INT4 group 128", int4(128).bits, int4(128), lambda x: _torchao_int4(x, 128, symmetric=True)),
    Peer("INT4 group 32", int4(32).bits, int4(32), lambda x: _torchao_int4(x, 32, symmetric=True)),
    Peer(
        "INT4 asymmetric group 32",
        4 + 20 / 32,
        lambda x: int4_asymmetric(x, 32),
        lambda x: _torchao_int4(x, 32, symmetric=False),
    ),
    Peer("NF4 block 64", NF4_BITS, nf4, _torchao_nf4),
)


def torchao_version() -> str | None:
    """The installed torchao's version; None where it is absent."""
    try:
        import torchao
    except ImportError:
        return None
    return str(torchao.__version__)
