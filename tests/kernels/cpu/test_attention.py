"""The core's attention on every instruction set, against the default implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import lobcq_fx.ops
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.format.state_rows import StateRows
from lobcq_fx.kernels.cpu.library import Core, CoreError
from tests.sweeps import crossed

SPECS = [FormatSpec(8, 64), FormatSpec(16, 16), FormatSpec(1, 128)]
WIDTHS = [64, 18, 200]


class Call:
    """6 query heads on 2 of keys and values, 9 queries after 61 tokens; some tokens are hidden from some queries."""

    def __init__(self, spec: FormatSpec, width: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.codebooks = universal_codebooks(spec.num_codebooks)
        self.query, self.scale = torch.randn(2, 6, 9, width, generator=generator), width**-0.5
        self.layout = StateRows(spec, 2, width)
        self.keys, self.values = (
            lobcq_fx.ops.quantize_states(
                torch.randn(2, 2, 70, width, generator=generator), self.codebooks, spec.array_size
            )
            for _ in range(2)
        )
        self.mask = (torch.rand(2, 1, 9, 70, generator=generator) > 0.3).expand(2, 6, 9, 70)

    def default(self, in_int8: bool = False) -> torch.Tensor:
        numbers = (2, self.layout.width, *2 * (self.layout.spec.array_size,), self.scale, in_int8)
        return lobcq_fx.ops.attention(self.query, self.keys, self.values, self.codebooks, self.mask, *numbers)

    def on(self, core: Core, in_int8: bool = False, **changes: Any) -> torch.Tensor:
        given = {name: changes.get(name, getattr(self, name)) for name in ("query", "keys", "values", "mask")}
        keys, values = ((given[name], self.layout) for name in ("keys", "values"))
        tables = core.tables(self.codebooks)
        return core.attention(tables, given["query"], keys, values, given["mask"], self.scale, in_int8)


@pytest.mark.parametrize(("spec", "width"), crossed(SPECS, WIDTHS))
def test_it_agrees_with_the_default(core: Core, spec: FormatSpec, width: int) -> None:
    call = Call(spec, width)
    torch.testing.assert_close(call.on(core), call.default(), rtol=1e-5, atol=1e-5)
    assert torch.equal(call.on(core, in_int8=True), call.default(in_int8=True))


@pytest.mark.parametrize("in_int8", [False, True])
def test_bits_depend_on_nothing_but_a_query_s_own_operands(core: Core, in_int8: bool) -> None:
    call = Call(FormatSpec(), 64)
    expected = call.on(core, in_int8)
    alone = Core(core.path)  # on the calling thread
    assert torch.equal(call.on(alone, in_int8), expected)
    for query in (0, 4, 8):
        part = slice(query, query + 1)
        changed = {"query": call.query[:, :, part].contiguous(), "mask": call.mask[:, :, part]}
        assert torch.equal(call.on(core, in_int8, **changed), expected[:, :, part])
    one = {name: getattr(call, name)[1:].contiguous() for name in ("query", "keys", "values", "mask")}
    assert torch.equal(call.on(core, in_int8, **one), expected[1:])
    shown = slice(0, 66)  # the others are hidden: as if they were not there
    call.mask = call.mask & (torch.arange(70) < 66)
    less = {name: getattr(call, name)[:, shown].contiguous() for name in ("keys", "values")}
    assert torch.equal(call.on(core, in_int8, **less, mask=call.mask[..., shown]), call.on(core, in_int8))


@pytest.mark.parametrize("in_int8", [False, True])
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0xFF])
def test_any_bytes_give_something(core: Core, byte: int, in_int8: bool) -> None:
    call = Call(FormatSpec(), 64)
    assert call.on(core, in_int8, keys=torch.full_like(call.keys, byte)).shape == call.query.shape
    assert call.on(core, in_int8, values=torch.full_like(call.values, byte)).shape == call.query.shape


@pytest.mark.parametrize("in_int8", [False, True])
@pytest.mark.parametrize("what", ["keys", "values", "query"])
def test_what_is_nan_reaches_those_that_look_at_it(core: Core, what: str, in_int8: bool) -> None:
    call = Call(FormatSpec(), 64)
    changed = getattr(call, what).clone()
    if what == "query":
        changed[1, ..., 7] = torch.inf
    else:
        changed[1, 40, :4] = torch.tensor([torch.nan]).view(torch.uint8)
    call.mask = torch.ones(2, 6, 9, 70, dtype=torch.bool)
    out = call.on(core, in_int8, **{what: changed})
    assert out[1].isnan().all()
    assert torch.equal(out[0], call.on(core, in_int8)[0])


def test_queries_in_many_blocks(core: Core) -> None:
    """More rows than share a task, their number no multiple of any, with a causal mask: whole tiles are left out."""
    call = Call(FormatSpec(16, 16), 64)
    generator = torch.Generator().manual_seed(1)
    call.query = torch.randn(2, 6, 131, 64, generator=generator)
    states = (torch.randn(2, 2, 131, 64, generator=generator) for _ in range(2))
    call.keys, call.values = (lobcq_fx.ops.quantize_states(one, call.codebooks, 16) for one in states)
    call.mask = torch.ones(131, 131, dtype=torch.bool).tril().expand(2, 6, 131, 131)
    torch.testing.assert_close(call.on(core), call.default(), rtol=1e-5, atol=1e-5)
    assert torch.equal(call.on(core, in_int8=True), call.default(in_int8=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_over_floats_it_is_torch_s_own(core: Core, width: int, dtype: torch.dtype) -> None:
    """Keys and values in longer memory, as a cache with room for more has them; values wider than keys."""
    call = Call(FormatSpec(), width)
    key, value = (torch.randn(2, 2, 90, n, generator=torch.Generator().manual_seed(n)) for n in (width, width + 16))
    operands = [one.to(dtype) for one in (call.query, key, value)]
    operands[1:] = (one[:, :, :70] for one in operands[1:])
    exact = [one.double() for one in operands]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    added = torch.where(call.mask, 0.0, -torch.inf)
    for mask in (None, call.mask, added.to(dtype), torch.where(call.mask, 0.5, torch.finfo(dtype).min).to(dtype)):
        double = mask.double() if mask is not None and mask.dtype != torch.bool else mask
        expected = scaled_dot_product_attention(*exact, double, scale=0.2, enable_gqa=True)
        actual = core.float_attention(*operands, mask, 0.2)
        torch.testing.assert_close(actual.double(), expected, **tolerance)
        for query in (0, 8):  # bits depend on nothing but a query's own operands
            part = slice(query, query + 1)
            one = core.float_attention(
                operands[0][:, :, part].contiguous(), *operands[1:], None if mask is None else mask[:, :, part], 0.2
            )
            assert torch.equal(one, actual[:, :, part])


def test_over_floats_a_query_that_looks_nowhere_gives_zeros_and_nan_reaches_those_that_look(core: Core) -> None:
    query, key, value = (torch.randn(1, 4, n, 64) for n in (3, 40, 40))
    mask = torch.ones(1, 4, 3, 40, dtype=torch.bool)
    mask[:, :, 1] = False
    out = core.float_attention(query, key, value, mask, 0.125)
    assert not out[:, :, 1].any()
    assert out[:, :, 0].any()
    value[:, 1, 7] = torch.nan
    out = core.float_attention(query, key, value, mask, 0.125)
    assert out[:, 1, 0].isnan().all()
    assert not out[:, 0].isnan().any()


def test_what_the_core_refuses(core: Core) -> None:
    call = Call(FormatSpec(), 64)
    for layout in (StateRows(FormatSpec(), 4, 64), StateRows(FormatSpec(8, 32), 2, 64), StateRows(FormatSpec(), 2, 1)):
        call.layout = layout
        with pytest.raises((CoreError, ValueError)):
            call.on(core)
    wide = Call(FormatSpec(), 1030)
    with pytest.raises(CoreError, match="inconsistent"):
        wide.on(core)
    five = Call(FormatSpec(), 64)
    with pytest.raises(CoreError, match="inconsistent"):  # 5 query heads on 2
        five.on(core, query=five.query[:, :5].contiguous(), mask=five.mask[:, :5])
    other = Call(FormatSpec(16, 64), 64)
    other.codebooks = universal_codebooks(8)
    with pytest.raises(CoreError, match="inconsistent"):  # rows of another format than the tables
        other.on(core)
