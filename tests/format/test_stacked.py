"""Stacked weights against golden bytes, and grouped products against one product a row."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lobcq_fx.format import (
    FormatSpec,
    absmax_row_scale,
    decode,
    decode_stack,
    encode,
    encode_int8,
    encode_stack,
    grouped_matmul,
    matmul,
    sqnr_db,
    universal_codebooks,
)
from lobcq_fx.format.error import row_squares, sqnr_db_of
from lobcq_fx.format.stacked import EncodedStack, group_bounds
from tests.format.cases import bits
from tests.format.stacked_vectors import FILE

CASES = json.loads(FILE.read_text(encoding="utf-8"))


def floats(values: object) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.uint32).view(np.float32).copy())


@pytest.mark.parametrize("case", CASES, ids=[case["format"] for case in CASES])
def test_golden_vectors(case):
    codebooks = torch.tensor(case["codebooks"], dtype=torch.int8)
    stack = encode_stack(floats(case["x"]), FormatSpec.from_name(case["format"]), codebooks)
    assert stack.codes.tolist() == case["codes"]
    assert stack.selectors.tolist() == case["selectors"]
    assert stack.scales.view(torch.uint8).tolist() == case["scales"]
    assert bits(stack.tensor_scale.numpy()) == case["tensor_scale"]
    assert bits(decode_stack(stack).numpy()) == case["decoded"]


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    scale = torch.tensor([1.0, 10.0, 0.0, 0.1]).view(4, 1, 1)
    return torch.randn(4, 6, 72, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("search", [False, True])
def test_each_matrix_is_encoded_as_if_alone(weights, search):
    spec, codebooks = FormatSpec(), universal_codebooks(8)
    stack = encode_stack(weights, spec, codebooks, search_scales=search)
    assert stack.shape == (4, 6, 72)
    alone = [encode(one, spec, codebooks, search_scales=search) for one in weights]
    assert stack.nbytes == sum(one.nbytes for one in alone)
    for index, one in enumerate(alone):
        for part in ("codes", "selectors", "scales", "tensor_scale"):
            assert torch.equal(*(getattr(e, part).view(-1).view(torch.uint8) for e in (stack.matrix(index), one)))
    squares = [row_squares(weights[index], stack.matrix(index)) for index in (0, 1)]
    assert sqnr_db_of(squares[0]) == sqnr_db(weights[0], alone[0])
    assert abs(sqnr_db_of(torch.cat(squares)) - sqnr_db(weights[0], alone[0])) < 1


@pytest.mark.parametrize("kind", ["codebooks", "int8"])
@pytest.mark.parametrize(
    "ends", [[2, 2, 5, 9], [0, 0, 0, 0], [3, 1, 20, 4], [-5, 4, 4, 2**31 - 1], [9, 9, 9, 9], [1, 2, 3, 4]]
)
def test_rows_meet_the_matrix_of_their_group(weights, kind, ends):
    """Row by row: the last group that starts at or before it, by ends that never fall and never pass the rows."""
    x = torch.randn(9, 72, generator=torch.Generator().manual_seed(1))
    x[7, 3] = torch.nan
    codebooks = universal_codebooks(8)
    stack = encode_stack(weights, FormatSpec(), codebooks)
    a = encode_int8(x, 64) if kind == "int8" else encode(x, FormatSpec(), codebooks, absmax_row_scale(x))
    out = grouped_matmul(a, stack, ends)
    rising = np.maximum.accumulate([max(end, 0) for end in ends])
    for row in range(9):
        group = int((rising <= row).sum())
        if group == 4:
            assert not out[row].any()
            continue
        expected = matmul(a, stack.matrix(group))[row]
        torch.testing.assert_close(out[row], expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_bounds_cover_no_row_twice_and_none_that_is_not():
    assert group_bounds([2, 1, 7, 5], 6) == [(0, 2), (2, 2), (2, 6), (6, 6)]
    assert group_bounds([], 3) == []


def test_refusals(weights):
    spec, codebooks = FormatSpec(), universal_codebooks(8)
    with pytest.raises(ValueError, match="at least one matrix"):
        encode_stack(weights[0], spec, codebooks)
    bad = weights.clone()
    bad[2, 1, 5] = torch.inf
    with pytest.raises(ValueError, match=r"matrix 2: x\[1, 5\] is inf"):
        encode_stack(bad, spec, codebooks)
    stack = encode_stack(weights, spec, codebooks)
    x = torch.ones(2, 72)
    a = encode(x, spec, codebooks, absmax_row_scale(x))
    with pytest.raises(ValueError, match="3 ends of groups for 4 matrices"):
        grouped_matmul(a, stack, [0, 1, 2])
    with pytest.raises(ValueError, match="K = 72"):
        grouped_matmul(a, encode_stack(weights[:, :, :64], spec, codebooks), [0, 1, 2, 2])


def test_a_stack_of_one_and_shapes():
    one = encode(torch.ones(2, 16), FormatSpec(1, 16), universal_codebooks(1))
    stack = EncodedStack.of([one])
    assert stack.shape == (1, 2, 16)
    assert torch.equal(decode(stack.matrix(0)), decode(one))
