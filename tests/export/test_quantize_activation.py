"""The function bodies of the encoders against the format, byte for byte, in ONNX Runtime."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.ops import quantize_activation, quantize_activation_int8, rotate
from tests.export.single_node import Operator, sums_empty_tensors
from tests.format.cases import EVERY_SPEC, KINDS, codebooks_of, int8, matrix


def assert_same(expected: tuple[torch.Tensor, ...], actual: list[torch.Tensor]) -> None:
    for part, (want, have) in enumerate(zip(expected, actual, strict=True)):
        assert want.shape == have.shape, part
        torch.testing.assert_close(have.float(), want.float(), rtol=0, atol=0, equal_nan=True, msg=f"part {part}")


@pytest.mark.parametrize("array_size", [16, 32, 64, 128])
def test_int8_byte_for_byte(array_size):
    encode = Operator("QuantizeActivationInt8", array_size=array_size)
    for kind in KINDS:
        for columns in (1, 60, 200):
            x = torch.from_numpy(matrix(kind, 6, columns, seed=columns)).view(2, 3, columns)
            assert_same(quantize_activation_int8(x, array_size), encode(x))


@pytest.mark.parametrize("array_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rotation_bit_for_bit(array_size, dtype):
    turn = Operator("Rotate", dtype, array_size=array_size)
    for kind in KINDS:
        x = torch.from_numpy(matrix(kind, 6, 256, seed=array_size)).view(2, 3, 256).to(dtype)
        assert_same((rotate(x, array_size),), turn(x))
    for shape in ((128,), (2, 0, 128), (0, 128)):
        assert_same((rotate(torch.ones(shape, dtype=dtype), array_size),), turn(torch.ones(shape, dtype=dtype)))


def test_every_int8_scale_is_rounded_up():
    """Ratios at each value of E4M3 and its neighbours in fp32, with t = 1."""
    values = 127 * torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([values, values.nextafter(torch.tensor(0.0)), values.nextafter(torch.tensor(torch.inf))])
    x = torch.nn.functional.pad(x.view(1, -1, 1), (0, 15)).flatten(1)
    encode, static = Operator("QuantizeActivationInt8", array_size=16), torch.tensor(1.0)
    assert_same(quantize_activation_int8(x, 16, static), encode(x, static))


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=lambda spec: spec.name)
def test_all_formats_byte_for_byte(spec):
    encode = Operator("QuantizeActivation", array_size=spec.array_size)
    codebooks = int8(codebooks_of(3, spec.num_codebooks))
    for kind in KINDS:
        for columns in (1, 60, 200):
            x = torch.from_numpy(matrix(kind, 6, columns, seed=columns)).view(2, 3, columns)
            assert_same(quantize_activation(x, codebooks, spec.array_size), encode(x, codebooks))


@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e-39, 1e30])
def test_static_scale(scale):
    encode, in_int8 = (Operator(f"QuantizeActivation{kind}", array_size=32) for kind in ("", "Int8"))
    codebooks, static = int8(codebooks_of(1, 8)), torch.tensor(scale)
    for kind in KINDS:
        x = torch.from_numpy(matrix(kind, 3, 70, seed=5))
        x[1, 40] = torch.nan
        assert_same(quantize_activation(x, codebooks, 32, static), encode(x, codebooks, static))
        assert_same(quantize_activation_int8(x, 32, static), in_int8(x, static))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_rows(bad):
    encode = Operator("QuantizeActivation", array_size=64)
    codebooks = int8(codebooks_of(1, 8))
    x = torch.from_numpy(matrix("normal", 4, 130, seed=5))
    x[1, 129] = x[3, 0] = bad
    expected = quantize_activation(x, codebooks, 64)
    assert expected[3].isnan().flatten().tolist() == [False, True, False, True]
    assert_same(expected, encode(x, codebooks))
    assert_same(quantize_activation_int8(x, 64), Operator("QuantizeActivationInt8", array_size=64)(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_floats(dtype):
    encode = Operator("QuantizeActivation", dtype, array_size=64)
    codebooks = int8(codebooks_of(2, 16))
    x = torch.from_numpy(matrix("heavy", 5, 100, seed=1)).to(dtype)
    assert_same(quantize_activation(x, codebooks, 64), encode(x, codebooks))
    assert_same(quantize_activation_int8(x, 64), Operator("QuantizeActivationInt8", dtype, array_size=64)(x))


EMPTY = [pytest.param(shape, marks=sums_empty_tensors) for shape in ((0, 72), (2, 0, 72))]


@pytest.mark.parametrize("shape", [(72,), (2, 1, 3, 72), *EMPTY], ids=str)
def test_any_leading_dimensions(shape):
    encode = Operator("QuantizeActivation", array_size=64)
    codebooks = int8(codebooks_of(2, 4))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_same(quantize_activation(x, codebooks, 64), encode(x, codebooks))
    assert_same(quantize_activation_int8(x, 64), Operator("QuantizeActivationInt8", array_size=64)(x))
