"""Keys and values to rows of a cache by the core, on every instruction set, byte for byte against the format."""

from __future__ import annotations

import pytest
import torch

import lobcq_fx.ops
from lobcq_fx.errors import LobcqError
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.kernels.bind import bind_cpu_core
from lobcq_fx.kernels.cpu.library import Core
from tests.sweeps import crossed

bind_cpu_core()


def states(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


SPECS = [FormatSpec(8, 64), FormatSpec(16, 16), FormatSpec(1, 128)]
SHAPES = [
    *((2, 3, 5, 64), (1, 1, 1, 1), (1, 40, 2, 80), (2, 2, 3, 1100), (1, 5, 3, 300)),
    *((0, 2, 3, 64), (1, 2, 0, 64), (1, 0, 2, 64), (1, 2, 2, 0)),
]


@pytest.mark.parametrize(("spec", "shape"), crossed(SPECS, SHAPES))
def test_rows_are_the_format_s(core: Core, spec: FormatSpec, shape: tuple[int, ...]) -> None:
    """Many heads in a slab, slabs of whole heads, and heads wider than a slab."""
    codebooks = universal_codebooks(spec.num_codebooks)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = states(*shape, dtype=dtype)
        expected = lobcq_fx.ops.quantize_states(x, codebooks, spec.array_size)
        assert torch.equal(core.encode_states(core.tables(codebooks), x, spec.array_size), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_spoils_itself_alone(core: Core, bad: float) -> None:
    x, codebooks = states(2, 3, 4, 64), universal_codebooks(8)
    x[1, 2, 3, 7], x[0, 0, 0] = bad, 0.0
    expected = lobcq_fx.ops.quantize_states(x, codebooks, 64)
    assert torch.equal(core.encode_states(core.tables(codebooks), x, 64), expected)


def test_the_op_reads_any_strides_and_addresses() -> None:
    codebooks, x = universal_codebooks(8), states(2, 3, 5, 64)
    expected = lobcq_fx.ops.quantize_states(x, codebooks, 64)
    by_token = x.transpose(1, 2).contiguous().transpose(1, 2)
    for one in (by_token, x.mT.contiguous().mT, x.repeat(1, 2, 1, 1)[:, 3:], x[:1].expand(2, 3, 5, 64)):
        found = torch.ops.lobcq.quantize_states(one, codebooks.mT.contiguous().mT, 64)
        assert torch.equal(found, lobcq_fx.ops.quantize_states(one.contiguous(), codebooks, 64))
    assert torch.equal(torch.ops.lobcq.quantize_states(by_token, codebooks, 64), expected)
    other = (codebooks.int() // 2).to(torch.int8)  # tables are remembered: of the right ones
    assert not torch.equal(torch.ops.lobcq.quantize_states(x, other, 64), expected)
    assert torch.equal(torch.ops.lobcq.quantize_states(x, codebooks, 64), expected)


@pytest.mark.parametrize("shape", [(0, 2, 4, 64), (3, 0, 4, 64), (3, 2, 0, 64), (3, 2, 4, 0)], ids=str)
def test_the_op_encodes_nothing_as_the_format_does(shape: tuple[int, ...]) -> None:
    x, codebooks = torch.empty(shape), universal_codebooks(8)
    expected = lobcq_fx.ops.quantize_states(x, codebooks, 64)
    assert torch.equal(torch.ops.lobcq.quantize_states(x, codebooks, 64), expected)


@pytest.mark.parametrize("implementation", [torch.ops.lobcq, lobcq_fx.ops], ids=["bound", "default"])
def test_operands_that_require_a_gradient_are_refused(implementation: object) -> None:
    x, codebooks = states(1, 2, 3, 64), universal_codebooks(8)
    rows = lobcq_fx.ops.quantize_states(x, codebooks, 64)
    calls = (
        lambda one: implementation.quantize_states(one, codebooks, 64),  # type: ignore[attr-defined]
        lambda one: implementation.attention(one, rows, rows, codebooks, None, 2, 64, 64, 64, 0.1),  # type: ignore[attr-defined]
    )
    for call in calls:
        for one in (x.clone().requires_grad_(), x.clone().requires_grad_() * 2):
            with pytest.raises((LobcqError, RuntimeError), match="inference only"):
                call(one)
            with torch.no_grad():
                assert not call(one).requires_grad
