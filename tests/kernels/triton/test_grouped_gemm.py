"""Groups of rows with a matrix each, against the products of what `lobcq_fx.format` decodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lobcq_fx.format import (
    EncodedStack,
    FormatSpec,
    absmax_row_scale,
    decode,
    decode_stack,
    encode,
    encode_int8,
    encode_stack,
)
from lobcq_fx.format.stacked import group_bounds
from lobcq_fx.kernels.triton.configs import PrefillConfig
from lobcq_fx.kernels.triton.encode_operand import encode_operand
from lobcq_fx.kernels.triton.grouped_gemm import Groups, default_grouped, grouped_gemm, row_tiles
from lobcq_fx.kernels.triton.lookup import Lookup
from lobcq_fx.kernels.triton.operands import Activation
from lobcq_fx.kernels.triton.weight_layout import CudaWeightLayout
from tests.kernels.triton.operands import DEVICE, activation, codebooks, parts
from tests.sweeps import crossed

EXPERTS, N, K = 4, 20, 200
ENDS = ([2, 2, 5, 9], [0, 0, 0, 0], [9, 3, -7, 2**31 - 1], [1, 2, 3, 4])
ROWS = torch.tensor([5, 0, 0, 3, 2, 1, 5, 5, 4])


def stack_of(spec: FormatSpec, outputs: int = N, columns: int = K) -> tuple[EncodedStack, Tensor]:
    weights = torch.randn(EXPERTS, outputs, columns, generator=torch.Generator().manual_seed(0))
    encoded = encode_stack(weights * torch.logspace(-1, 1, EXPERTS).view(-1, 1, 1), spec, codebooks(spec).cpu())
    layout = CudaWeightLayout()
    laid_out = [layout.pack(parts(encoded.matrix(index)), spec, columns) for index in range(EXPERTS)]
    return encoded, torch.stack(laid_out)


def product(
    a: Activation, encoded: EncodedStack, stack: Tensor, ends: list[int], rows: Tensor | None = ROWS,
    dtype: torch.dtype = torch.float32, config: PrefillConfig | None = None,
) -> Tensor:  # fmt: skip
    groups = Groups(torch.tensor(ends, dtype=torch.int32, device=DEVICE), None if rows is None else rows.to(DEVICE))
    scales, books = encoded.tensor_scale.to(DEVICE), encoded.codebooks.to(DEVICE)
    return grouped_gemm(a, stack, scales, groups, encoded.shape[1], books, encoded.spec, dtype, config)


def expected(rows: Tensor, encoded: EncodedStack, ends: list[int]) -> Tensor:
    """In float64, of rows that are decoded already."""
    out, weights = torch.zeros(len(rows), encoded.shape[1], dtype=torch.float64), decode_stack(encoded).double()
    for index, (start, stop) in enumerate(group_bounds(ends, len(rows))):
        out[start:stop] = rows[start:stop].double() @ weights[index].T
    return out


def assert_close(actual: Tensor, wanted: Tensor, rows: Tensor, tolerance: float = 2e-6) -> None:
    """fp32 sums: relative to the largest product that a row may have."""
    bound = rows.double().norm(dim=1, keepdim=True) * 1e2 * tolerance + 1e-30
    assert bool(((actual.cpu().double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("spec", [FormatSpec(8, 64), FormatSpec(16, 128), FormatSpec(2, 32), FormatSpec(1, 16)],
                         ids=lambda s: s.name)  # fmt: skip
def test_every_plan(spec: FormatSpec) -> None:
    encoded, stack = stack_of(spec)
    x, lookup = activation(6, K), Lookup.of(encoded.codebooks.to(DEVICE))
    for integers in {spec.array_size >= 32, False}:
        a = encode_operand(x.to(DEVICE), lookup, spec, None, integers)
        rows = decode(encode(x, spec, encoded.codebooks, absmax_row_scale(x)))[ROWS]
        assert_close(product(a, encoded, stack, ENDS[0]), expected(rows, encoded, ENDS[0]), rows)
        a = encode_operand(x.to(DEVICE), None, spec, None, integers)
        rows = decode(encode_int8(x, spec.array_size))[ROWS]
        assert_close(product(a, encoded, stack, ENDS[0]), expected(rows, encoded, ENDS[0]), rows)


@pytest.mark.parametrize(("ends", "gathered"), crossed(ENDS, [False, True]))
def test_ends_may_be_any_numbers(ends: list[int], gathered: bool) -> None:
    encoded, stack = stack_of(FormatSpec())
    x = activation(6 if gathered else 9, K).half()
    rows = x[ROWS] if gathered else x
    out = product(Activation(x.to(DEVICE)), encoded, stack, ends, ROWS if gathered else None)
    assert_close(out, expected(rows, encoded, ends), rows)
    behind = group_bounds(ends, 9)[-1][1]
    assert not bool(out[behind:].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_activations_and_taller_tiles(dtype: torch.dtype) -> None:
    """Groups of more than a tile, and outputs that fill none."""
    encoded, stack = stack_of(FormatSpec(), 70, 72)
    x, ends = activation(90, 72).to(dtype), [40, 41, 41, 88]
    for config in (None, PrefillConfig(tile_m=32, tile_n=32, warps=4)):
        out = product(Activation(x.to(DEVICE)), encoded, stack, ends, None, config=config)
        assert_close(out, expected(x.float(), encoded, ends), x.float())


def test_a_row_that_does_not_exist_is_nan_and_disturbs_no_other() -> None:
    encoded, stack = stack_of(FormatSpec())
    x, wrong = activation(6, K).half(), ROWS.clone()
    clean = product(Activation(x.to(DEVICE)), encoded, stack, ENDS[0])
    wrong[1], wrong[7] = 6, -(2**40)
    out = product(Activation(x.to(DEVICE)), encoded, stack, ENDS[0], wrong)
    others = [0, 2, 3, 4, 5, 6, 8]
    assert bool(out[[1, 7]].isnan().all())
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("rows", [0, 1, 7, 64])
@pytest.mark.parametrize("ends", [*ENDS, [1, 20, 20, 64], [64, 64, 64, 64]], ids=str)
def test_tiles_cover_each_row_of_a_group_once(rows: int, ends: list[int]) -> None:
    groups, firsts, last = row_tiles(torch.tensor(ends, dtype=torch.int32), rows, 16)
    bounds = group_bounds(ends, rows)
    assert last.tolist() == [stop for _, stop in bounds]
    covered = [
        (group, row)
        for group, first in zip(groups.tolist(), firsts.tolist(), strict=True)
        if group < EXPERTS
        for row in range(first, min(first + 16, bounds[group][1]))
    ]
    assert covered == [(group, row) for group, (start, stop) in enumerate(bounds) for row in range(start, stop)]


def test_no_rows() -> None:
    encoded, stack = stack_of(FormatSpec())
    a = Activation(torch.empty(0, K, device=DEVICE))
    assert product(a, encoded, stack, [0, 0, 0, 0], None).shape == (0, N)
    assert default_grouped(8, 64, torch.float16).tile_m == 16
