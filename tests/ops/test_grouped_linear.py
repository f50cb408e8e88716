"""lobcq::grouped_linear against the format's grouped product, whatever its offsets and rows hold."""

from __future__ import annotations

import pytest
import torch

import lobcq_fx.ops
from lobcq_fx.errors import LobcqError, OperandError
from lobcq_fx.format import (
    FormatSpec,
    absmax_row_scale,
    decode_stack,
    encode,
    encode_int8,
    encode_stack,
    grouped_matmul,
    universal_codebooks,
)
from lobcq_fx.format.stacked import group_bounds
from tests.ops.test_ops import OPCHECKS, assert_functional, weight_args
from tests.sweeps import sweep

K, N, EXPERTS, TOKENS = 200, 24, 4, 6
ENDS = ([2, 2, 5, 9], [0, 0, 0, 0], [9, 3, -7, 2**31 - 1], [1, 2, 3, 4])
ROWS = torch.tensor([5, 0, 0, 3, 2, 1, 5, 5, 4])
MODES = ("w4a4", "w4a8", "w4a16")
CODEBOOKS = universal_codebooks(8)
SPEC = FormatSpec()


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture(scope="module")
def stack():
    weights = torch.randn(EXPERTS, N, K, generator=torch.Generator().manual_seed(0))
    return encode_stack(weights * torch.tensor([1.0, 0.1, 10.0, 1.0]).view(4, 1, 1), SPEC, CODEBOOKS)


@pytest.fixture(scope="module")
def x():
    return torch.randn(TOKENS, K, generator=torch.Generator().manual_seed(1))


def run(mode, x, stack, offsets, rows=None, dtype=torch.float32, ops=torch.ops.lobcq):
    """The op on an activation that is encoded before rows are gathered."""
    if mode == "w4a16":
        return ops.grouped_linear.float_activation(x, *weight_args(stack), offsets, rows, 64)
    if mode == "w4a8":
        encoded = ops.quantize_activation_int8(x, 64)
        return ops.grouped_linear.int8_activation(*encoded, *weight_args(stack), offsets, rows, K, 64, dtype)
    encoded = ops.quantize_activation(x, CODEBOOKS, 64)
    return ops.grouped_linear(*encoded, CODEBOOKS, *weight_args(stack), offsets, rows, K, 64, dtype)


def expected_of(mode, gathered, stack, ends):
    """By the format, of rows that are encoded after they were gathered."""
    if mode == "w4a8":
        return grouped_matmul(encode_int8(gathered, 64), stack, ends)
    if mode == "w4a4":
        return grouped_matmul(encode(gathered, SPEC, CODEBOOKS, absmax_row_scale(gathered)), stack, ends)
    out, weights = torch.zeros(len(gathered), N), decode_stack(stack)
    for index, (start, stop) in enumerate(group_bounds(ends, len(gathered))):
        out[start:stop] = gathered[start:stop] @ weights[index].t()
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("rows", [None, ROWS], ids=["in order", "gathered"])
def test_it_is_the_format_s_grouped_product(mode, ends, rows, x, stack):
    gathered = x if rows is None else x[rows]
    out = run(mode, x, stack, int32(ends), rows)
    torch.testing.assert_close(out, expected_of(mode, gathered, stack, ends), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_groups_of_one_size_need_no_offsets(mode, stack):
    x = torch.randn(EXPERTS, 3, K, generator=torch.Generator().manual_seed(2))
    out = run(mode, x, stack, None)
    assert out.shape == (EXPERTS, 3, N)
    assert torch.equal(out.flatten(0, 1), run(mode, x.flatten(0, 1), stack, int32([3, 6, 9, 12])))
    assert run(mode, x[:, :0], stack, None).shape == (EXPERTS, 0, N)


@pytest.mark.parametrize("mode", ["w4a4", "w4a8"])
def test_a_bad_row_spoils_what_is_gathered_from_it_and_nothing_else(mode, x, stack):
    clean = run(mode, x, stack, int32([2, 2, 5, 9]), ROWS)
    spoiled = x.clone()
    spoiled[5, 70] = torch.nan
    out = run(mode, spoiled, stack, int32([2, 2, 5, 9]), ROWS)
    assert out[ROWS == 5].isnan().all()
    assert torch.equal(out[ROWS != 5], clean[ROWS != 5])


# A fake kernel treats the two halves alike.
@pytest.mark.parametrize(
    "dtype", sweep([torch.float32, torch.bfloat16, torch.float16], [torch.float32, torch.bfloat16])
)
def test_fake_kernels_agree(dtype, x, stack):
    lobcq, offsets = torch.ops.lobcq, int32([2, 2, 5, 9])
    x = x.to(dtype)
    packed, in_int8 = lobcq.quantize_activation(x, CODEBOOKS, 64), lobcq.quantize_activation_int8(x, 64)
    by_group = lobcq.quantize_activation(x[:4].unsqueeze(1), CODEBOOKS, 32)
    weight = weight_args(stack)
    checks = [
        (lobcq.grouped_linear.default, (*packed, CODEBOOKS, *weight, offsets, ROWS, K, 64, dtype)),
        (lobcq.grouped_linear.default, (*packed, CODEBOOKS, *weight, offsets, None, K, 64, dtype)),
        (lobcq.grouped_linear.default, (*by_group, CODEBOOKS, *weight, None, None, K, 64, dtype, 32)),
        (lobcq.grouped_linear.int8_activation, (*in_int8, *weight, offsets, ROWS, K, 64, dtype)),
        (lobcq.grouped_linear.float_activation, (x, *weight, offsets, ROWS, 64)),
    ]
    for op, args in checks:
        torch.library.opcheck(op, args, test_utils=OPCHECKS)
        assert_functional(op, args)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "offsets", "rows", "says"),
    [
        ((TOKENS, K), int32([1, 2, 3, 4]), torch.tensor([0, TOKENS]), "rows reach from 0 to 6: the activation has"),
        ((TOKENS, K), int32([1, 2, 3, 4]), torch.tensor([0, -1]), "rows reach from -1 to 0"),
        ((0, K), int32([1, 2, 3, 4]), torch.tensor([0]), "rows reach from 0 to 0"),
        ((2, 3, K), int32([1, 2, 3, 4]), None, "pass rows"),
        ((TOKENS, K), None, None, "without offsets pass"),
        ((4, 1, K), None, ROWS, "without offsets pass"),
        ((3, 2, K), None, None, "3 groups and the weight 4 matrices"),
    ],
)
def test_refusals(mode, shape, offsets, rows, says, stack):
    for ops in (torch.ops.lobcq, Defaults):
        with pytest.raises(OperandError, match=says):
            run(mode, torch.ones(shape), stack, offsets, rows, ops=ops)


class Defaults:
    """The default implementations, called as the dispatcher's ops are."""

    quantize_activation = staticmethod(lobcq_fx.ops.quantize_activation)
    quantize_activation_int8 = staticmethod(lobcq_fx.ops.quantize_activation_int8)

    class _Grouped:
        float_activation = staticmethod(lobcq_fx.ops.grouped_linear_float_activation)
        int8_activation = staticmethod(lobcq_fx.ops.grouped_linear_int8_activation)

        def __call__(self, *args):
            return lobcq_fx.ops.grouped_linear(*args)

    grouped_linear = _Grouped()


@pytest.mark.parametrize("mode", MODES)
def test_defaults_are_what_is_bound(mode, x, stack):
    for offsets, rows in ((int32([2, 2, 5, 9]), ROWS), (int32([0, 4, 4, 6]), None)):
        assert torch.equal(run(mode, x, stack, offsets, rows), run(mode, x, stack, offsets, rows, ops=Defaults))


def test_backward_says_that_the_ops_are_inference_only(stack):
    x = torch.ones(TOKENS, K, requires_grad=True)
    out = run("w4a16", x, stack, int32([1, 2, 3, 4]))
    with pytest.raises(LobcqError, match="inference only"):
        out.sum().backward()
