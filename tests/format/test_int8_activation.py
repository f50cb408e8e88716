"""Activations in int8: every byte against the oracle, what rounding up guarantees, NaN, and the product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobcq_fx.format import FormatSpec, decode, encode, encode_int8, matmul, universal_codebooks
from lobcq_fx.format.scales import int8_array_scales
from tests.format import oracle
from tests.format.cases import KINDS, PROPERTY, bits, matrix
from tests.format.test_matmul import assert_close_to_fp64

NAN_BYTE = 0x7F
BAD = (float("nan"), float("inf"), float("-inf"))


def same_bytes(x, array_size, tensor_scale=None):
    """Encode with the package and with the oracle, compare every byte and every decoded bit."""
    encoded = encode_int8(x, array_size, tensor_scale)
    rows = x.float().numpy()
    with np.errstate(all="ignore"):
        scales = [oracle.tensor_scale_of(row, 127 * 448) for row in rows]
    if tensor_scale is not None:
        scales = [np.float32(t) for t in tensor_scale.expand(len(rows), 1).flatten()]
    for row, t, entries, scale in zip(rows, scales, encoded.entries.tolist(), encoded.scales, strict=True):
        assert (entries, scale.view(torch.uint8).tolist()) == oracle.int8_row(row, array_size, t)
    assert bits(encoded.tensor_scale.expand(len(rows), 1).numpy()) == bits(np.array(scales).reshape(-1, 1))
    values = np.repeat([[oracle.E4M3[b] for b in row] for row in encoded.scales.view(torch.uint8)], array_size, axis=1)
    products = (encoded.entries.numpy().astype(np.float32) * values.astype(np.float32))[:, : x.shape[1]]
    assert bits(decode(encoded).numpy()) == bits(products * np.array(scales, np.float32).reshape(-1, 1))
    return encoded


@pytest.mark.parametrize("array_size", [16, 32, 64, 128])
@pytest.mark.parametrize("columns", [1, 77, 256])
def test_row_scales(array_size, columns):
    x = torch.from_numpy(matrix("heavy", 3, columns, seed=columns)) * torch.tensor([[1.0], [1e-6], [300.0]])
    encoded = same_bytes(x, array_size)
    assert encoded.entries.abs().amax(1).tolist() == [127] * 3 or array_size > columns
    assert not encoded.entries[:, columns:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static", [None, 1.0, 1e-38, 1e30, 2.0**-149])
def test_kinds_of_data(kind, static):
    x = torch.from_numpy(matrix(kind, 3, 135, seed=11))
    same_bytes(x, 32, None if static is None else torch.tensor(static))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(dtype):
    same_bytes(torch.from_numpy(matrix("normal", 3, 100, seed=2)).to(dtype), 64)


def test_every_scale_and_its_neighbours_round_up():
    """t = 1 and absmax = 127 v make the ratio exactly v, or its neighbour in fp32."""
    values = np.array(oracle.E4M3[1:], np.float32)
    exact = (127 * values).astype(np.float32)  # at most 11 bits
    around = np.concatenate([exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))])
    arrays = torch.zeros(len(around), 16)
    arrays[:, 5] = torch.from_numpy(around)
    found = int8_array_scales(arrays, torch.tensor(1.0)).view(torch.uint8).tolist()
    assert found == [oracle.int8_scale_byte([v], np.float32(1)) for v in around]
    assert found[: len(values)] == list(range(1, 127))
    assert found[-2:] == [126, 126]  # saturates


@PROPERTY
@given(
    absmax=st.floats(0, width=32, allow_infinity=False, allow_nan=False),
    t=st.floats(0, width=32, allow_infinity=False, allow_nan=False, exclude_min=True),
)
def test_any_absmax_and_tensor_scale(absmax, t):
    x = torch.tensor([[absmax, -absmax / 3] + [0.0] * 14], dtype=torch.float32)
    same_bytes(x, 16, torch.tensor(t, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform"])
def test_nothing_is_clipped(kind):
    """Every scalar is within half a step of what it decodes to, the largest ones too."""
    x = torch.from_numpy(matrix(kind, 8, 512, seed=3))
    encoded = encode_int8(x, 64)
    steps = (encoded.scales.float() * encoded.tensor_scale).repeat_interleave(64, dim=1)
    assert ((decode(encoded) - x).abs() <= steps * 0.5001).all()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("scale", ["computed", "given", "static"])
def test_not_finite(value, scale):
    """One scale a row: the row becomes NaN. A static one: the block array does. Entries under NaN are 0."""
    x = torch.from_numpy(matrix("normal", 5, 200, seed=1))
    scales = {"computed": None, "given": torch.full((5, 1), 1e-3), "static": torch.tensor(1e-3)}[scale]
    clean = encode_int8(x, 64, scales)
    x[2, 130] = value
    encoded = encode_int8(x, 64, scales)
    bad = torch.zeros(5, 4, dtype=torch.bool)
    bad[2, 2 if scale == "static" else slice(None)] = True
    assert torch.equal(encoded.scales.view(torch.uint8) == NAN_BYTE, bad)
    assert torch.equal(decode(encoded).isnan(), bad.repeat_interleave(64, dim=1)[:, :200])
    assert not encoded.entries[bad.repeat_interleave(64, dim=1)].any()
    others = [0, 1, 3, 4]
    assert torch.equal(encoded.entries[others], clean.entries[others])
    if scale != "static":
        assert encoded.tensor_scale.isnan().flatten().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("array_size", [16, 128])
@pytest.mark.parametrize("columns", [1, 77, 256])
def test_product(array_size, columns):
    x, y = matrix("heavy", 3, columns, 1), matrix("normal", 4, columns, 2)
    spec, bias = FormatSpec(8, array_size), torch.linspace(-1, 1, 4)
    a, w = encode_int8(torch.from_numpy(x), array_size), encode(torch.from_numpy(y), spec, universal_codebooks(8))
    assert_close_to_fp64(matmul(a, w, bias), a, w, bias)


def test_product_is_a_sum_of_integer_dot_products():
    """The rule as hardware executes it, at the largest magnitude that an array's dot product can have."""
    codebook = torch.tensor([[-31, *range(-7, 7), 31]], dtype=torch.int8)
    w = encode(torch.tensor([[31.0] * 128 + [-31.0] * 128]), FormatSpec(1, 128), codebook, torch.tensor(1.0))
    a = encode_int8(torch.tensor([[127.0] * 128 + [254.0] * 128]), 128, torch.tensor(1.0))
    assert a.entries.unique().tolist() == [127]
    assert matmul(a, w).item() == 127 * 31 * 128 * (1 - 2)


def test_rows_and_shapes():
    x = torch.from_numpy(matrix("normal", 5, 100, seed=1))
    encoded = encode_int8(x, 32)
    assert torch.equal(decode(encoded.rows(1, 3)), decode(encoded)[1:3])
    for shape in ((0, 64), (3, 0)):
        assert decode(encode_int8(torch.ones(shape), 64)).shape == shape


def test_refusals():
    with pytest.raises(ValueError, match="array_size=48"):
        encode_int8(torch.ones(1, 64), 48)
    with pytest.raises(ValueError, match=r"pass a scalar or \[2, 1\]"):
        encode_int8(torch.ones(2, 64), 64, torch.ones(2))
    with pytest.raises(ValueError, match="leading dimensions flattened"):
        encode_int8(torch.ones(64), 64)
