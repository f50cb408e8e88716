"""`lobcq::linear_prepacked` with prologues and residuals on the CPU, where the default implementations run the core."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lobcq_fx.errors import LobcqError
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.ops.prologues import layer_norm, rms_norm, silu_mul
from tests.kernels.test_linear_prepacked import OPCHECKS, Linears

pytestmark = pytest.mark.skipif(weight_layout(torch.device("cpu")) is None, reason="the CPU core was not built")

op = torch.ops.lobcq.linear_prepacked
COLUMNS, LEADING = 200, (2, 3)


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def linears() -> Linears:
    return Linears(COLUMNS)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return values(*LEADING, COLUMNS)


def assert_all_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def residuals(linears: Linears) -> list[Tensor]:
    """For the first and last, none for the one between."""
    return [torch.empty(0) if i == 1 else values(*LEADING, n) for i, n in enumerate(linears.outputs)]


def added(results: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return [out + one if one.numel() else out for out, one in zip(results, more, strict=True)]


def test_residuals(linears: Linears, x: Tensor) -> None:
    more = residuals(linears)
    actual = op.residual(x, linears.tables, None, *linears.rest, more, torch.float32)
    assert_all_equal(actual, added(linears.w4a4(x), more))
    actual = op.float_activation_residual(x, *linears.rest, more)
    assert_all_equal(actual, added(linears.w4a16(x), more))


def test_residuals_are_added_to_the_rounded_result(linears: Linears, x: Tensor) -> None:
    more = [one.bfloat16() for one in residuals(linears)]
    actual = op.residual(x, linears.tables, None, *linears.rest, more, torch.bfloat16)
    assert_all_equal(actual, added(linears.w4a4(x, dtype=torch.bfloat16), more))


def test_silu_mul(linears: Linears, x: Tensor) -> None:
    up, more = values(3, 2, COLUMNS).view(*LEADING, COLUMNS), residuals(linears)
    actual = op.silu_mul(x, up, linears.tables, None, *linears.rest, more, torch.float32)
    assert_all_equal(actual, added(linears.w4a4(silu_mul(x, up)), more))


def test_int8_activations(linears: Linears, x: Tensor) -> None:
    """Without tables every overload encodes in int8."""
    weight, more = values(COLUMNS), residuals(linears)
    up, tail = values(3, 2, COLUMNS).view(*LEADING, COLUMNS), (None, None, *linears.rest)
    normed, layer_normed = rms_norm(x, weight, 1e-5), layer_norm(x, weight, None, 1e-5)
    assert_all_equal(op.residual(x, *tail, more, torch.float32), added(linears.w4a8(x), more))
    assert_all_equal(op.silu_mul(x, up, *tail, more, torch.float32), added(linears.w4a8(silu_mul(x, up)), more))
    assert_all_equal(op.rms_norm(x, weight, 1e-5, 0.0, True, *tail, torch.float32), linears.w4a8(normed))
    assert_all_equal(op.layer_norm(x, weight, None, 1e-5, *tail, torch.float32), linears.w4a8(layer_normed))
    total, *results = op.add_rms_norm(x, up, weight, 1e-5, 0.0, True, *tail, torch.float32)
    assert_all_equal(results, linears.w4a8(rms_norm(total, weight, 1e-5)))


def test_rotated_activations() -> None:
    """Every overload rotates what its prologue gives."""
    linears, x, up = Linears(128), values(*LEADING, 128).bfloat16(), values(3, 2, 128).view(*LEADING, 128).bfloat16()
    weight, more, none = values(128).bfloat16(), residuals(linears), [torch.empty(0)] * 3
    tail = (linears.tables, None, *linears.rest)

    def rotated(x: Tensor) -> list[Tensor]:
        return linears.w4a4(torch.ops.lobcq.rotate(x, linears.spec.array_size))

    assert_all_equal(op.residual(x, *tail, more, torch.float32, True), added(rotated(x), more))
    assert_all_equal(op.silu_mul(x, up, *tail, none, torch.float32, True), rotated(silu_mul(x, up)))
    normed, layer_normed = rms_norm(x, weight, 1e-5), layer_norm(x, weight, None, 1e-5)
    assert_all_equal(op.rms_norm(x, weight, 1e-5, 0.0, True, *tail, torch.float32, True), rotated(normed))
    assert_all_equal(op.layer_norm(x, weight, None, 1e-5, *tail, torch.float32, True), rotated(layer_normed))
    total, *results = op.add_rms_norm(x, up, weight, 1e-5, 0.0, True, *tail, torch.float32, True)
    assert_all_equal(results, rotated(rms_norm(total, weight, 1e-5)))


@pytest.mark.parametrize("round_first", [True, False])
def test_rms_norm(linears: Linears, x: Tensor, round_first: bool) -> None:
    x, weight = x.bfloat16(), values(COLUMNS).bfloat16()
    actual = op.rms_norm(x, weight, 1e-5, 1.0, round_first, linears.tables, None, *linears.rest, torch.float32)
    assert_all_equal(actual, linears.w4a4(rms_norm(x, weight, 1e-5, 1.0, round_first)))


def test_add_rms_norm(linears: Linears, x: Tensor) -> None:
    residual = values(3, 2, COLUMNS).view(*LEADING, COLUMNS)
    rest = (None, 1e-5, 0.0, True, linears.tables, None, *linears.rest, torch.float32)
    total, *results = op.add_rms_norm(x, residual, *rest)
    assert torch.equal(total, x + residual)
    assert_all_equal(results, linears.w4a4(rms_norm(x + residual, None, 1e-5)))


def test_layer_norm(linears: Linears, x: Tensor) -> None:
    weight, bias = values(COLUMNS), values(COLUMNS) + 1
    actual = op.layer_norm(x, weight, bias, 1e-5, linears.tables, None, *linears.rest, torch.float32)
    assert_all_equal(actual, linears.w4a4(layer_norm(x, weight, bias, 1e-5)))


def test_operands_of_other_shapes_or_dtypes_are_refused(linears: Linears, x: Tensor) -> None:
    """Kernels would read beyond them."""
    tail = (linears.tables, None, *linears.rest)
    none = [torch.empty(0)] * 3
    with pytest.raises(LobcqError, match=r"up is float32 \[200\] on cpu: pass float32 \[2, 3, 200\] on cpu"):
        op.silu_mul(x, x[0, 0], *tail, none, torch.float32)
    with pytest.raises(LobcqError, match=r"residual is bfloat16 .*: pass float32 \[..., K\]"):
        op.add_rms_norm(x, x.bfloat16(), None, 1e-5, 0.0, True, *tail, torch.float32)
    with pytest.raises(LobcqError, match=r"residuals\[0\] is float32 \[33\] on cpu: pass float32 \[2, 3, 33\]"):
        op.residual(x, *tail, [torch.ones(33), *none[1:]], torch.float32)


@pytest.mark.parametrize("transposed", [False, True])
def test_fake_kernels_agree_with_real_ones(linears: Linears, x: Tensor, transposed: bool) -> None:
    x = x.transpose(0, 1) if transposed else x
    other, weight = values(*x.shape), values(COLUMNS)
    more = [one.transpose(0, 1) if transposed and one.numel() else one for one in residuals(linears)]
    tail = (linears.tables, None, *linears.rest)
    norm = (weight, 1e-5, 0.0, True)
    for overload, arguments in {
        op.residual: (x, *tail, more, torch.float32),
        op.float_activation_residual: (x, *linears.rest, more),
        op.silu_mul: (x, other, *tail, more, torch.float32),
        op.rms_norm: (x, *norm, *tail, torch.float32),
        op.add_rms_norm: (x, other, *norm, *tail, torch.float32),
        op.layer_norm: (x, weight, None, 1e-5, *tail, torch.float32),
    }.items():
        torch.library.opcheck(overload, arguments, test_utils=OPCHECKS)
