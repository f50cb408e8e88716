"""Grid, codes and selectors, on every grid value there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobcq_fx.format.codes import CHUNK, CodeTables, assign_codes, entries_of, to_grid
from tests.format import oracle
from tests.format.cases import PROPERTY, codebooks_of, int8

EVERY_GRID_VALUE = range(-2047, 2048)

EXTREMES = [
    [-31] * 16,
    [31] * 16,
    [0] * 16,
    [-31] * 8 + [31] * 8,
    list(range(-8, 8)),
    list(range(-31, 1, 2)),
    [-31, -30, -29, -28, -27, -26, -25, -24, 24, 25, 26, 27, 28, 29, 30, 31],
]


@pytest.mark.parametrize("codebook", EXTREMES + codebooks_of(0, 4))
def test_nearest_entry_of_every_grid_value(codebook):
    grid = torch.zeros(4095, 8, dtype=torch.int32)
    grid[:, 0] = torch.tensor(EVERY_GRID_VALUE)
    codes, selectors = assign_codes(grid, CodeTables.of(int8([codebook])))
    assert codes[:, 0].tolist() == [oracle.nearest_entry(q, codebook) for q in EVERY_GRID_VALUE]
    assert selectors.tolist() == [[0]] * 4095


@PROPERTY
@given(
    blocks=st.lists(st.lists(st.integers(-2047, 2047), min_size=8, max_size=8), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    number=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_blocks_of_any_grid_values(blocks, seed, number):
    codebooks = codebooks_of(seed, number)
    codes, selectors = assign_codes(torch.tensor(blocks, dtype=torch.int32), CodeTables.of(int8(codebooks)))
    expected = [oracle.encode_block(block, codebooks) for block in blocks]
    assert selectors.tolist() == [[selector] for selector, _ in expected]
    assert codes.tolist() == [block_codes for _, block_codes in expected]


@pytest.mark.parametrize(("last", "order", "selector"), [
    (-191, (31, 30), 1), (-190, (31, 30), 0), (-189, (31, 30), 0),
    (-191, (30, 31), 0), (-190, (30, 31), 0), (-189, (30, 31), 1),
])  # fmt: skip
def test_sums_of_errors_are_exact(last, order, selector):
    """Codebooks of one entry, 31 and 30: sum (q - 496)^2 - sum (q - 480)^2 = -32 (sum q - 3904).

    The sum of q is 3904 where the last is -190: a tie at a cost of about 2.4e7, beyond what fp32 adds exactly.
    """
    block = torch.tensor([[2047, 2047, 2047, 2047, -2047, -2047, 0, last]], dtype=torch.int32)
    _, selectors = assign_codes(block, CodeTables.of(int8([[entry] * 16 for entry in order])))
    assert selectors.item() == selector


def test_identical_codebooks_choose_the_first():
    codebooks = int8([list(range(-8, 8))] * 16)
    _, selectors = assign_codes(torch.arange(-512, 512, dtype=torch.int32).view(1, -1), CodeTables.of(codebooks))
    assert selectors.max() == 0


def test_a_block_sees_only_its_own_scalars():
    """Changing one block changes neither codes nor selectors of its neighbours."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.randint(-500, 500, (2, 64), generator=generator, dtype=torch.int32)
    tables = CodeTables.of(int8(codebooks_of(5, 8)))
    codes, selectors = assign_codes(grid, tables)
    changed = grid.clone()
    changed[0, 24:32] = 77
    other_codes, other_selectors = assign_codes(changed, tables)
    kept = torch.ones(2, 64, dtype=torch.bool)
    kept[0, 24:32] = False
    assert torch.equal(codes[kept], other_codes[kept])
    assert torch.equal(selectors[kept.view(2, 8, 8)[..., 0]], other_selectors[kept.view(2, 8, 8)[..., 0]])


@pytest.mark.parametrize(
    ("x", "q"),
    [
        (0.0, 0),
        (1.0, 16),
        (0.03125, 0),  # half a step: rint to the even 0
        (0.09375, 2),  # one and a half: the even 2
        (-0.09375, -2),
        (127.9375, 2047),
        (128.0, 2047),
        (1e30, 2047),
        (-1e30, -2047),
    ],
)
def test_grid(x, q):
    arrays = torch.full((1, 1, 16), x)
    one = torch.ones(1, 1).to(torch.float8_e4m3fn)
    assert to_grid(arrays, one, torch.tensor(1.0)).unique().tolist() == [q]


@pytest.mark.parametrize(("scale", "t"), [(0.0, 1.0), (1.0, 0.0), (2.0**-9, 2.0**-149), (float("nan"), 1.0)])
def test_grid_is_zero_where_there_is_nothing_to_divide_by(scale, t):
    arrays = torch.tensor([[[0.0, 1.0, -3e38, 2.0**-149] * 4]])
    scales = torch.tensor([[scale]]).to(torch.float8_e4m3fn)
    assert to_grid(arrays, scales, torch.tensor(t)).unique().tolist() == [0]


def test_grid_of_a_quotient_that_overflows():
    arrays = torch.tensor([[[3e38, -3e38] * 8]])
    grid = to_grid(arrays, torch.full((1, 1), 2.0**-9).to(torch.float8_e4m3fn), torch.tensor(1e-3))
    assert grid.flatten()[:2].tolist() == [2047, -2047]


def test_entries_are_looked_up_by_block():
    codebooks, selectors = codebooks_of(1, 4), [[3, 0], [1, 2]]
    codes = [list(range(16)), list(range(15, -1, -1))]
    uint8 = torch.uint8
    entries = entries_of(torch.tensor(codes, dtype=uint8), torch.tensor(selectors, dtype=uint8), int8(codebooks))
    expected = [[codebooks[selectors[r][i // 8]][codes[r][i]] for i in range(16)] for r in range(2)]
    assert entries.dtype == torch.int8
    assert entries.tolist() == expected


def test_a_chunk_is_small():
    assert CHUNK * 128 <= 32 << 20  # at most about 128 bytes of working memory a scalar: 32 MiB
