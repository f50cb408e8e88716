"""Products of groups of rows in the core: the bits of linears one by one, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.cpu.library import Core, CoreError
from lobcq_fx.kernels.cpu.operands import KernelActivation
from tests.format.cases import ALL_SPECS
from tests.kernels.cpu.operands import activation, weight

KINDS = ("encoded", "int8", "floats")
GROUPS = (range(1), range(1, 1), range(1, 30), range(30, 33), range(25, 40))


def of_kind(core: Core, kind: str, tables, x: Tensor, array_size: int) -> KernelActivation:
    if kind == "floats":
        return core.split_activation(x, array_size)
    return core.encode_activation(tables if kind == "encoded" else None, x, array_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ALL_SPECS[::6], ids=lambda s: s.name)
def test_groups_are_linears_of_their_rows(core: Core, kind: str, spec: FormatSpec) -> None:
    """Rows may be of two groups, or of none; the last two overlap here."""
    weights = [weight(core, spec, 37, 200) for _ in GROUPS]
    tables, x = weights[0].tables, activation(40, 200)
    a = of_kind(core, kind, tables, x, spec.array_size)
    results = core.grouped_linear(tables, [w.kernel for w in weights], GROUPS, a)
    for w, rows, result in zip(weights, GROUPS, results, strict=True):
        part = of_kind(core, kind, tables, x[rows.start : rows.stop].contiguous(), spec.array_size)
        assert torch.equal(result, core.linear(tables, w.kernel, part))


@pytest.mark.parametrize("kind", KINDS)
def test_gathered_rows_are_as_if_encoded_after_they_were_gathered(core: Core, kind: str) -> None:
    w, x = weight(core, FormatSpec(8, 128), 37, 333), activation(7, 333)
    rows = torch.tensor([6, 0, 0, 3, 5])
    gathered = core.gather_activation(of_kind(core, kind, w.tables, x, 128), rows)
    expected = core.linear(w.tables, w.kernel, of_kind(core, kind, w.tables, x[rows], 128))
    assert torch.equal(core.linear(w.tables, w.kernel, gathered), expected)
    none = core.gather_activation(of_kind(core, kind, w.tables, x, 128), rows[:0])
    assert core.linear(w.tables, w.kernel, none).shape == (0, 37)


@pytest.mark.parametrize("rows", [[7], [-1], [0, 2**62]])
def test_rows_that_do_not_exist_are_refused(core: Core, rows: list[int]) -> None:
    w = weight(core, FormatSpec(), 37, 200)
    a = core.encode_activation(w.tables, activation(7, 200), 64)
    with pytest.raises(CoreError, match="argument"):
        core.gather_activation(a, torch.tensor(rows))


@pytest.mark.parametrize("group", [range(-1, 3), range(38, 41), range(41, 41), range(2**62, 2**62 + 1)])
def test_groups_beyond_the_activation_are_refused(core: Core, group: range) -> None:
    w = weight(core, FormatSpec(), 37, 200)
    a = core.encode_activation(w.tables, activation(40, 200), 64)
    with pytest.raises(CoreError, match="argument"):
        core.grouped_linear(w.tables, [w.kernel, w.kernel], [range(2), group], a)


def test_a_weight_of_another_shape_is_refused(core: Core) -> None:
    w, other = weight(core, FormatSpec(), 37, 200), weight(core, FormatSpec(), 37, 264)
    a = core.encode_activation(w.tables, activation(40, 200), 64)
    with pytest.raises(CoreError):
        core.grouped_linear(w.tables, [w.kernel, other.kernel], [range(2), range(2, 4)], a)
    assert core.grouped_linear(w.tables, [], [], a) == []
