from __future__ import annotations

import pytest
import torch

from lobcq_fx.benchmarking.contender import (
    CHECKED_ROWS,
    COLD_BYTES,
    COLD_ROWS,
    MOST_COPIES,
    Contender,
    Starter,
    WrongProductError,
    checked_rows,
    copies_needed,
)
from lobcq_fx.benchmarking.integers import OFFSET, codes_and_scales

WEIGHT = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
X = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
EXPECTED = checked_rows(X).double() @ WEIGHT.double().t()


def starter(product) -> Starter:
    return Starter(Contender(WEIGHT.nbytes, lambda: product))


def test_a_right_product_passes() -> None:
    starter(lambda x: x @ WEIGHT.t()).check(X, EXPECTED, 1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x @ WEIGHT.flip(0).t(),
        lambda x: torch.zeros(len(x), 24),
        lambda x: (x @ WEIGHT.t()).fill_(torch.nan),
        lambda x: x @ WEIGHT.t() * (1 + 1e-4),
        lambda x: torch.cat((x[:-1] @ WEIGHT.t(), torch.zeros(1, 24))),  # the last row was not written
    ],
    ids=["other rows", "zeros", "NaN", "a wrong scale", "an unwritten row"],
)
def test_a_wrong_product_is_refused(wrong) -> None:
    with pytest.raises(WrongProductError, match="relative error"):
        starter(wrong).check(X, EXPECTED, 1e-5)


def test_first_and_last_rows_are_checked() -> None:
    rows = torch.arange(100.0).view(100, 1)
    assert checked_rows(rows).flatten().tolist() == [*range(8), *range(92, 100)]
    assert checked_rows(rows[:CHECKED_ROWS]) is not None
    assert torch.equal(checked_rows(rows[:3]), rows[:3])


@pytest.mark.parametrize("size", [2 << 20, 5_000_000, COLD_BYTES - 1, COLD_BYTES, 3 * COLD_BYTES])
def test_cold_copies_are_larger_than_the_caches(size: int) -> None:
    for rows in (1, COLD_ROWS):
        copies = copies_needed(size, rows)
        assert copies * size > COLD_BYTES
        assert copies == 2 or (copies - 1) * size <= COLD_BYTES
    assert copies_needed(size, COLD_ROWS + 1) == 1


def test_copies_of_tiny_weights_are_limited() -> None:
    assert copies_needed(1, rows=1) == MOST_COPIES


def test_a_burst_calls_each_copy_once_with_what_it_accepts() -> None:
    made, called = [], []

    def copy():
        number = len(made)
        made.append(number)
        return lambda x: called.append((number, x.dtype))

    one = Starter(Contender(COLD_BYTES // 4, copy, accept=lambda x: x.to(torch.bfloat16)))
    every = [(number, torch.bfloat16) for number in range(5)]
    for _ in range(2):  # copies are made once
        called.clear()
        burst = one.burst(X[:1])
        assert called == every  # what a first call prepares is not timed
        for call in burst:
            call()
        assert called == 2 * every
    assert len(one.burst(X)) == 1
    assert len(made) == 5


def test_integers_of_a_group() -> None:
    codes, scales = codes_and_scales(WEIGHT, 16)
    signed = (codes - OFFSET).view(24, 2, 16)
    assert signed.abs().amax(dim=2).eq(7).all()
    error = (signed * scales.unsqueeze(2)).view(24, 32) - WEIGHT
    assert (error.view(24, 2, 16).abs() <= scales.unsqueeze(2) * 0.5001).all()
    with pytest.raises(ValueError, match="K = 32 is no multiple of its group of 24"):
        codes_and_scales(WEIGHT, 24)
