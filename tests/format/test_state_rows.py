"""Rows of a cache: every byte has its place, and the format's own encoding is what stands there."""

from __future__ import annotations

import pytest
import torch

import lobcq_fx.ops
from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, universal_codebooks
from lobcq_fx.format.state_rows import StateRows, states_spec

quantize, dequantize = lobcq_fx.ops.quantize_states, lobcq_fx.ops.dequantize_states


def states(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.1, 30, shape[1]).view(-1, 1, 1)  # heads of very different magnitudes


@pytest.mark.parametrize("name", ["8x64", "16x128", "4x32", "1x16"])
@pytest.mark.parametrize(("heads", "width"), [(3, 64), (1, 128), (2, 18), (5, 80)])
def test_each_head_is_encoded_with_the_scale_of_its_token(name, heads, width):
    spec = FormatSpec.from_name(name)
    codebooks, x = universal_codebooks(spec.num_codebooks), states(2, heads, 7, width)
    rows = quantize(x, codebooks, spec.array_size)
    assert rows.shape == (2, 7, StateRows(spec, heads, width).row_bytes)
    decoded = dequantize(rows, codebooks, heads, width, spec.array_size, torch.float32)
    tensor_scale = absmax_row_scale(x.transpose(1, 2).flatten(2)).view(14, 1)
    for head in range(heads):
        expected = decode(encode(x[:, head].reshape(14, width), spec, codebooks, tensor_scale))
        assert torch.equal(decoded[:, head].reshape(14, width), expected)


def test_rows_are_independent_and_laid_out_as_documented():
    codebooks, x = universal_codebooks(8), states(1, 3, 5, 64)
    rows = quantize(x, codebooks, 64)
    assert torch.equal(torch.cat([quantize(one, codebooks, 64) for one in x.split(1, dim=2)], dim=1), rows)
    tensor_scale = absmax_row_scale(x[0, :, 2].flatten())
    encoded = encode(x[0, :, 2], FormatSpec(8, 64), codebooks, tensor_scale.expand(3, 1))
    expected = tensor_scale.view(torch.uint8).tolist()
    for head in range(3):
        one = encoded.rows(head, head + 1)
        expected += [*one.codes[0].tolist(), *one.selectors[0].tolist(), *one.scales.view(torch.uint8)[0].tolist()]
    assert rows[0, 2].tolist() == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_decodes_to_nan_and_disturbs_no_other(bad):
    codebooks, x = universal_codebooks(8), states(1, 2, 4, 64)
    clean = dequantize(quantize(x, codebooks, 64), codebooks, 2, 64, 64, torch.float32)
    x[0, 0, 1, 5] = bad
    found = dequantize(quantize(x, codebooks, 64), codebooks, 2, 64, 64, torch.float32)
    assert found[:, :, 1].isnan().all()
    assert torch.equal(found[:, :, [0, 2, 3]], clean[:, :, [0, 2, 3]])


@pytest.mark.parametrize("shape", [(0, 2, 4, 64), (3, 0, 4, 64), (3, 2, 0, 64), (3, 2, 4, 0)], ids=str)
def test_nothing_is_encoded_to_rows_of_the_right_size(shape):
    batch, heads, tokens, width = shape
    rows = quantize(torch.empty(shape), universal_codebooks(8), 64)
    assert rows.shape == (batch, tokens, StateRows(FormatSpec(), heads, width).row_bytes)
    assert dequantize(rows, universal_codebooks(8), heads, width, 64, torch.float32).shape == shape


@pytest.mark.parametrize(
    ("width", "asked", "taken"),
    [(64, 64, 64), (128, 64, 64), (128, 128, 128), (80, 64, 16), (96, 64, 32), (32, 64, 32), (18, 64, 32), (8, 64, 16)],
)
def test_arrays_are_as_long_as_costs_no_padding(width, asked, taken):
    assert states_spec(FormatSpec(8, asked), width) == FormatSpec(8, taken)
