"""`lobcq::linear_prepacked` on the CPU takes operands that lie anywhere in memory, and refuses what it misreads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lobcq_fx.ops
from lobcq_fx.errors import LobcqError
from lobcq_fx.format import universal_codebooks
from tests.kernels.cpu.operands import at_offset
from tests.kernels.test_linear_prepacked import LAYOUT, STATIC, W4A4, Linears, replaced, values

needs_core = pytest.mark.skipif(LAYOUT is None, reason="the CPU core was not built, or is switched off")

OFFSETS = (1, 2, 4, 16)
"""Bytes behind an address that 64 divides."""


@needs_core
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 20])
def test_results_do_not_depend_on_where_operands_lie(offset: int, dtype: torch.dtype, rows: int) -> None:
    linears, x = Linears(200), values(rows, 200).to(dtype)
    linears.biases = [bias.to(dtype) for bias in linears.biases]
    expected = [*linears.w4a4(x, dtype=dtype), *linears.w4a4(x, STATIC), *linears.w4a16(x)]
    weights, scales, tables, biases, outputs, array_size = linears.rest
    moved = [at_offset(weight, offset) for weight in weights]
    rest = (moved, [at_offset(scale, offset) for scale in scales], at_offset(tables, offset))
    rest += ([at_offset(bias, offset) for bias in biases], outputs, array_size)
    x, tables = at_offset(x, offset), at_offset(tables, offset)
    assert {tensor.data_ptr() % 64 for tensor in (x, tables, *moved)} == {offset}
    actual = [
        *W4A4(x, tables, None, *rest, dtype),
        *W4A4(x, tables, at_offset(STATIC, offset), *rest, torch.float32),
        *torch.ops.lobcq.linear_prepacked.float_activation(x, *rest),
    ]
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@needs_core
def test_activations_that_lie_anywhere_with_gaps_between_rows() -> None:
    linears, x = Linears(200), values(6, 400)
    for actual, expected in zip(linears.w4a4(at_offset(x, 1)[:, 100:300]), linears.w4a4(x[:, 100:300]), strict=True):
        assert torch.equal(actual, expected)


def gaps(tensor: Tensor) -> Tensor:
    """The same values, every second element of another tensor."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def released(tensor: Tensor) -> Tensor:
    """A tensor that says its size and has no memory."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


WEIGHTS, SCALES, TABLES, BIASES, ARRAY_SIZE = 0, 1, 2, 3, 5
REFUSALS = {
    "weights that repeat a byte": (WEIGHTS, lambda w: w[:1].expand(len(w)), "a weight is not contiguous uint8"),
    "weights with gaps": (WEIGHTS, gaps, "a weight is not contiguous uint8"),
    "signed weights": (WEIGHTS, lambda w: w.view(torch.int8), "a weight is not contiguous uint8"),
    "float weights": (WEIGHTS, lambda w: w.float(), "a weight is not contiguous uint8"),
    "weights without memory": (WEIGHTS, released, "a weight is not contiguous uint8"),
    "an empty scale": (SCALES, lambda s: s.new_empty(0), "a scale does not have one element"),
    "a scale for each row": (SCALES, lambda s: s.expand(33), "a scale does not have one element"),
    "a bf16 scale": (SCALES, lambda s: s.bfloat16(), "a tensor scale is not contiguous fp32"),
    "a uint8 scale": (SCALES, lambda s: s.to(torch.uint8), "a tensor scale is not contiguous fp32"),
    "an fp64 scale": (SCALES, lambda s: s.double(), "a tensor scale is not contiguous fp32"),
    "tables with gaps": (TABLES, gaps, "a set of tables is not contiguous uint8"),
    "float tables": (TABLES, lambda t: t.float(), "a set of tables is not contiguous uint8"),
    "an integer bias": (BIASES, lambda b: b.long(), "a tensor is not in fp32, bf16 or fp16"),
    "an fp64 bias": (BIASES, lambda b: b.double(), "a tensor is not in fp32, bf16 or fp16"),
    "a bias with gaps": (BIASES, gaps, "a bias is not contiguous floats"),
    "a bias that repeats a number": (BIASES, lambda b: b[:1].expand(len(b)), "a bias is not contiguous floats"),
    "an array size whose low half is one": (ARRAY_SIZE, lambda size: 2**32 + size, "not supported"),
}


@needs_core
@pytest.mark.parametrize("case", REFUSALS)
def test_operands_that_would_be_misread_are_refused(case: str) -> None:
    position, change, message = REFUSALS[case]
    linears, x = Linears(200), values(2, 200)
    given = linears.rest[position]
    changed = [change(given[0]), *given[1:]] if isinstance(given, list) else change(given)
    with pytest.raises(RuntimeError, match=f"lobcq::linear_prepacked: .*{message}"):
        W4A4(x, linears.tables, None, *replaced(linears, position, changed), torch.float32)
    linears.check(linears.w4a4(x), x, linears.fake_quantized(x))  # and nothing is broken afterwards


BAD_SCALES = {
    "zero": 0.0,
    "negative": -1.0,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "two": [1.0, 1.0],
    "none": [],
}


@needs_core
@pytest.mark.parametrize("case", BAD_SCALES)
def test_a_static_scale_that_no_calibration_gives_is_refused(case: str) -> None:
    linears = Linears(200)
    with pytest.raises(RuntimeError, match=r"static_scale is .*positive and finite|scale does not have one element"):
        linears.w4a4(values(2, 200), torch.tensor(BAD_SCALES[case]))


@needs_core
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_a_static_scale_of_another_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="static_scale is not contiguous fp32"):
        Linears(200).w4a4(values(2, 200), torch.ones((), dtype=dtype))


@pytest.mark.parametrize("case", BAD_SCALES)
def test_the_encoder_refuses_it_too(case: str) -> None:
    x, scale = values(2, 200), torch.tensor(BAD_SCALES[case])
    for encode in (torch.ops.lobcq.quantize_activation, lobcq_fx.ops.quantize_activation):
        with pytest.raises(LobcqError, match=r"static_scale is .*: it must be one positive finite number"):
            encode(x, universal_codebooks(8), 64, scale)
