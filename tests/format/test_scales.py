"""Tensor scales and block-array scales, against exact values and an enumeration of E4M3."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobcq_fx.format import absmax_row_scale, absmax_tensor_scale, tensor_scale_of_absmax
from lobcq_fx.format.scales import array_scales
from tests.format import oracle
from tests.format.cases import KINDS, PROPERTY, bits, matrix

NAN_BYTE = 0x7F


def scale_bytes(absmax, t):
    """Scale bytes of arrays [absmax, 0, 0, ...], one a row, computed by the package."""
    arrays = torch.zeros(len(absmax), 16)
    arrays[:, 3] = torch.as_tensor(absmax, dtype=torch.float32)
    return array_scales(arrays, torch.tensor(t)).view(torch.uint8).tolist()


class TestE4M3:
    def test_enumeration_agrees_with_the_dtype(self):
        """All 256 bytes: the oracle's arithmetic and torch's table of the type are the same numbers."""
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
        assert np.array_equal(values, [oracle.e4m3_value(byte) for byte in range(256)], equal_nan=True)

    def test_every_value_every_midpoint_and_their_neighbours(self):
        """t = 1 and absmax = 31 v make the ratio exactly v: the rounding of each interval, both ends and the tie."""
        values = np.array(oracle.E4M3, np.float32)
        middles = (values[1:] + values[:-1]) / 2  # exact
        points = np.concatenate([values[1:], middles])
        exact = (31 * points).astype(np.float32)
        around = np.concatenate([exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))])
        expected = [oracle.array_scale_byte([v], np.float32(1)) for v in around]
        assert scale_bytes(around, 1.0) == expected
        ties = expected[len(values) - 1 : len(exact)]
        assert ties[0] == 1  # midway between 0 and 2**-9: rounds to 0, hence the smallest scale
        assert all(byte % 2 == 0 for byte in ties[1:])

    @pytest.mark.parametrize(
        ("absmax", "byte"),
        [
            (31.0, 0x38),  # ratio 1
            (31 * 448.0, 0x7E),  # the largest
            (31 * 464.0, 0x7E),  # midway to what would be 480: still 448
            (31 * 465.0, 0x7E),  # saturates, it does not become NaN (0x7F)
            (3.4e38, 0x7E),
            (31 * 2.0**-9, 0x01),
            (31 * 2.0**-10, 0x01),  # a tie with 0, the even one; a positive absmax takes the smallest
            (2.0**-149, 0x01),
            (0.0, 0x00),
            (31 * 1.0625, 0x38),  # midway between 1 and 1.125: the even mantissa, 0
            (31 * 1.1875, 0x3A),  # midway between 1.125 and 1.25: the even mantissa, 2
        ],
    )
    def test_by_hand(self, absmax, byte):
        assert scale_bytes([absmax], 1.0) == [byte]

    def test_divides_twice(self):
        """(absmax / 31) / t, each quotient rounded: absmax / (31 t) would give another byte for these."""
        rng = np.random.default_rng(0)
        differ = 0
        for _ in range(200):
            t = np.float32(rng.uniform(1e-4, 1e-3))
            tie = np.float32(rng.integers(9, 16) + 0.5) * np.float32(31) * t  # close to a midpoint of [8, 16)
            twice, once = np.float32(tie / np.float32(31)) / t, tie / np.float32(np.float32(31) * t)
            differ += oracle.e4m3_byte(float(twice)) != oracle.e4m3_byte(float(once))
            assert scale_bytes([tie], float(t)) == [oracle.e4m3_byte(float(twice))]
        assert differ

    @PROPERTY
    @given(
        absmax=st.floats(0, width=32, allow_infinity=False, allow_nan=False),
        t=st.floats(0, width=32, allow_infinity=False, allow_nan=False),
    )
    def test_any_absmax_and_tensor_scale(self, absmax, t):
        with np.errstate(all="ignore"):
            assert scale_bytes([absmax], t) == [oracle.array_scale_byte([absmax], np.float32(t))]


class TestArrayScales:
    def test_sign_and_position_do_not_matter(self):
        for position in range(64):
            arrays = torch.full((1, 64), 0.5)
            arrays[0, position] = -7.75
            assert array_scales(arrays, torch.tensor(1.0)).float().item() == 0.25

    def test_a_tensor_scale_for_each_row(self):
        arrays = torch.full((2, 3, 16), 31.0)
        scales = array_scales(arrays, torch.tensor([[1.0], [4.0]]))
        assert scales.dtype == torch.float8_e4m3fn
        assert scales.float().tolist() == [[1.0] * 3, [0.25] * 3]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("position", [0, 7, 8, 15])
    def test_bad_scalar_marks_its_array(self, bad, position):
        arrays = torch.ones(3, 16)
        arrays[1, position] = bad
        assert array_scales(arrays, torch.tensor(1.0)).view(torch.uint8).tolist() == [0x10, NAN_BYTE, 0x10]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_bad_tensor_scale_marks_every_array_of_its_row(self, bad):
        arrays = torch.zeros(2, 2, 16)
        scales = array_scales(arrays, torch.tensor([[1.0], [bad]])).view(torch.uint8)
        assert scales.tolist() == [[0, 0], [NAN_BYTE, NAN_BYTE]]


class TestTensorScale:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (2, 1000)])
    def test_against_the_oracle(self, kind, shape):
        x = matrix(kind, *shape, seed=1)
        rows = [oracle.tensor_scale_of(row) for row in x]
        assert bits(absmax_tensor_scale(torch.from_numpy(x)).numpy()) == bits(oracle.tensor_scale_of(x.ravel()))
        assert bits(absmax_row_scale(torch.from_numpy(x)).numpy()) == bits(np.array(rows).reshape(-1, 1))

    def test_divisor(self):
        assert absmax_tensor_scale(torch.tensor([[-13888.0, 3.0]])).item() == 1
        assert tensor_scale_of_absmax(torch.tensor([0.0, 13888.0, 27776.0])).tolist() == [1, 1, 2]

    def test_divides_and_does_not_multiply_by_the_reciprocal(self):
        absmax = np.random.default_rng(0).uniform(0.1, 10, 1000).astype(np.float32)
        expected = absmax / np.float32(13888)
        assert not np.array_equal(expected, absmax * (np.float32(1) / np.float32(13888)))
        assert np.array_equal(tensor_scale_of_absmax(torch.from_numpy(absmax)).numpy(), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_gives_fp32(self, dtype):
        x = torch.from_numpy(matrix("normal", 4, 50, seed=3)).to(dtype)
        assert absmax_row_scale(x).dtype == torch.float32
        assert torch.equal(absmax_row_scale(x), absmax_row_scale(x.float()))
        assert torch.equal(absmax_tensor_scale(x), absmax_tensor_scale(x.float()))

    def test_shapes(self):
        x = torch.ones(2, 3, 5)
        assert absmax_row_scale(x).shape == (2, 3, 1)
        assert absmax_tensor_scale(x).shape == ()
        assert absmax_tensor_scale(x.transpose(0, 2)).shape == ()

    @pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
    def test_empty_is_1(self, shape):
        assert absmax_tensor_scale(torch.zeros(shape)).item() == 1
        assert absmax_row_scale(torch.zeros(shape)).tolist() == [[1.0]] * shape[0]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_not_finite_is_nan_in_its_row_only(self, bad, dtype):
        for position in range(0, 77, 4):  # wherever it falls in a vectorised reduction
            x = torch.ones(3, 77, dtype=dtype)
            x[1, position] = bad
            assert absmax_row_scale(x).isnan().flatten().tolist() == [False, True, False]
            assert absmax_tensor_scale(x).isnan()
