"""torch's own linears."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from lobcq_fx.benchmarking.contender import Call, Contender
from lobcq_fx.benchmarking.integers import codes_and_scales

INT4_GROUP = 128


def torch_fp32(weight: Tensor, _threads: int) -> Contender:
    """`torch.nn.functional.linear` in fp32."""

    def copy() -> Call:
        own = weight.clone()
        return lambda x: linear(x, own)

    return Contender(weight.nbytes, copy)


def torch_bf16(weight: Tensor, _threads: int) -> Contender:
    """`torch.nn.functional.linear` in bf16; the activation is bf16 already, as in a bf16 model."""
    half = weight.to(torch.bfloat16)

    def copy() -> Call:
        own = half.clone()
        return lambda x: linear(x, own)

    return Contender(half.nbytes, copy, accept=_to_bf16)


def torch_int4(weight: Tensor, _threads: int) -> Contender:
    """`aten::_weight_int4pack_mm_for_cpu`: 4-bit weights in groups of 128, in a bf16 model (its fastest)."""
    aten = torch.ops.aten
    codes, scales = codes_and_scales(weight, INT4_GROUP)
    packed = aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    scales_and_zeros = torch.stack((scales.t(), torch.zeros_like(scales.t())), dim=-1).to(torch.bfloat16).contiguous()

    def copy() -> Call:
        own, own_scales = packed.clone(), scales_and_zeros.clone()
        return lambda x: aten._weight_int4pack_mm_for_cpu(x, own, INT4_GROUP, own_scales)

    return Contender(packed.nbytes + scales_and_zeros.nbytes, copy, accept=_to_bf16)


def _to_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)
