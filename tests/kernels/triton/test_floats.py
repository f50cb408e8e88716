"""Conversions, over every half-precision number and over fp32 of every exponent."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from lobcq_fx.kernels.triton.floats import narrow, widen
from tests.kernels.triton.operands import DEVICE, assert_same_bits

COUNT = 1 << 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@triton.jit
def _convert(x, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, narrow(widen(tl.load(x + i)), out.dtype.element_ty))


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(COUNT, dtype=dtype, device=DEVICE)
    _convert[(1,)](x.to(DEVICE), out, COUNT, num_warps=32, enable_fp_fusion=True)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_every_number(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_same_bits(converted(x, torch.float32).nan_to_num(nan=7.0), x.float().nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrowing_every_exponent_and_ties(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (COUNT,), generator=generator).to(torch.int32).view(torch.float32)
    x[::2] = x[::2].to(dtype).float() * (1 + torch.finfo(dtype).eps / 2)
    out = converted(x, dtype)
    assert_same_bits(out.nan_to_num(nan=7.0), x.to(dtype).nan_to_num(nan=7.0))
    assert torch.equal(out.isnan().cpu(), x.isnan())
