"""Rounding with feedback: the core's bytes are the reference's, on every instruction set."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec
from lobcq_fx.format.feedback import Rounded, round_with_feedback
from lobcq_fx.kernels.cpu.library import Core
from tests.format.cases import EVERY_SPEC
from tests.kernels.cpu.operands import codebooks


class Operands(NamedTuple):
    weight: Tensor
    other_errors: Tensor
    coupling: Tensor
    power: Tensor


def exact(rows: int, columns: int, seed: int = 0) -> Operands:
    """Numbers of so few bits that sums of errors are exact, in whatever order; tensor scale 1.

    Entries times scales are then multiples of 2^-9, couplings multiples of 1/2, errors below 2^9.
    """
    generator = torch.Generator().manual_seed(seed)
    magnitude = 2.0 ** torch.randint(-3, 9, (rows, 1), generator=generator)
    weight = (torch.randn(rows, columns, generator=generator) * magnitude * 512).round() / 512
    coupling = torch.randint(-1, 2, (columns, columns), generator=generator) / 2
    coupling *= torch.rand(columns, columns, generator=generator) < 0.05
    power = torch.rand(columns, generator=generator)
    power[torch.rand(columns, generator=generator) < 0.1] = 0
    return Operands(weight, weight - weight.round(), coupling.triu(1) + torch.eye(columns), power)


def real(rows: int, columns: int) -> Operands:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator)
    coupling = torch.randn(columns, columns, generator=generator).triu(1) / columns**0.5
    power = torch.randn(columns, generator=generator).square()
    return Operands(weight, weight - weight.round(), coupling + torch.eye(columns), power)


def both(core: Core, given: Operands, spec: FormatSpec, tensor_scale: float) -> tuple[Rounded, Rounded]:
    books = codebooks(spec)
    codes, selectors, scales, costs = core.compensate(core.tables(books), *given, tensor_scale, spec.array_size)
    expected = round_with_feedback(*given, torch.tensor(tensor_scale), books, spec)
    return Rounded(codes, selectors, scales.view(torch.float8_e4m3fn), costs), expected


def assert_same(actual: Rounded, expected: Rounded) -> None:
    assert torch.equal(actual.scales.view(torch.uint8), expected.scales.view(torch.uint8))
    assert torch.equal(actual.selectors, expected.selectors)
    assert torch.equal(actual.codes, expected.codes)
    torch.testing.assert_close(actual.costs, expected.costs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=lambda s: s.name)
def test_every_format(core: Core, spec: FormatSpec) -> None:
    """Arrays with more columns before them than are computed at once, and rows that are not together with others."""
    assert_same(*both(core, exact(5, 3 * spec.array_size + 128), spec, 1.0))


@pytest.mark.parametrize("tensor_scale", [2.0**-6, 2.0**6])
def test_scales_at_both_ends_of_their_range(core: Core, tensor_scale: float) -> None:
    given = exact(6, 256)
    given.weight[:2], given.weight[2, :64] = 0, 2.0**-9
    assert_same(*both(core, given, FormatSpec(), tensor_scale))


def test_without_feedback_any_numbers_give_the_same(core: Core) -> None:
    given = real(9, 320)._replace(coupling=torch.eye(320))
    assert_same(*both(core, given, FormatSpec(16, 64), 3e-4))


def test_sums_in_another_order_change_little(core: Core) -> None:
    actual, expected = both(core, real(64, 512), FormatSpec(), 3e-4)
    assert (actual.codes == expected.codes).float().mean() > 0.95
    torch.testing.assert_close(actual.costs.sum(0), expected.costs.sum(0), rtol=5e-3, atol=0)


def test_threads_and_other_rows_change_nothing(core: Core) -> None:
    given, tables, serial = real(35, 512), core.tables(codebooks(FormatSpec())), Core(core.path)
    one, many = (way.compensate(tables, *given, 3e-4, 64) for way in (serial, core))
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))
    some = given._replace(weight=given.weight[7:12], other_errors=given.other_errors[7:12])
    alone = core.compensate(tables, *some, 3e-4, 64)
    assert all(torch.equal(a, b[7:12]) for a, b in zip(alone, many, strict=True))


def test_no_rows_and_no_columns(core: Core) -> None:
    for rows, columns in ((0, 64), (3, 0)):
        assert_same(*both(core, real(rows, max(columns, 1))._replace(**_empty(rows, columns)), FormatSpec(), 1.0))


def _empty(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "weight": torch.zeros(rows, columns),
        "other_errors": torch.zeros(rows, columns),
        "coupling": torch.eye(columns),
        "power": torch.ones(columns),
    }


def test_columns_that_fill_no_array_are_refused(core: Core) -> None:
    with pytest.raises(ValueError, match="96 columns are not whole block arrays of 64"):
        core.compensate(core.tables(codebooks(FormatSpec())), *real(3, 96), 1.0, 64)
