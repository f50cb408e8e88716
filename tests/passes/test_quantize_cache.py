"""A graph's cache as rows of bytes: where it is rewritten, and near misses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lobcq_fx.cache_format import CacheFormat
from lobcq_fx.format import FormatSpec
from lobcq_fx.passes.quantize_cache import QuantizeCache
from lobcq_fx.tracing.trace import trace_module
from tests.passes.graphs import assert_metadata, assert_unchanged, aten, lobcq, nodes, run, values

HEADS = ((2, 32, 32),)  # of an odd power of two: the two matrices of a rotation differ


class Attention(nn.Module):
    """Without softmax: enough of one to read all keys and values, and to return them grown."""

    def __init__(self, read=lambda past, keys, values: keys @ values.mT, append=lambda *states: torch.cat(states, -2)):
        super().__init__()
        self.read, self.append = read, append

    def forward(self, x, key, value):
        keys, values = self.append(key, x), self.append(value, -x)
        return self.read(key, keys, values), keys, values


def operands(batch=2, past=5):
    return values(batch, 2, 3, 32), values(batch, 2, past, 32, seed=2), values(batch, 2, past, 32, seed=3)


def traced(model):
    return trace_module(model, operands()).graph_module


def quantize_cache(rotate_keys=False):
    return QuantizeCache(CacheFormat(FormatSpec(), rotate_keys), HEADS, torch.float32)


@pytest.mark.parametrize("rotate_keys", [False, True])
def test_states_are_appended_to_rows_and_read_as_they_decode(rotate_keys):
    model, graph_module, one = Attention(), traced(Attention()), quantize_cache(rotate_keys)
    assert len(nodes(graph_module, aten.cat.default)) == 2
    assert one(graph_module).modified
    assert len(nodes(graph_module, lobcq.quantize_states.default)) == 2
    assert len(nodes(graph_module, aten.matmul.default)) == 1 + 2 * rotate_keys
    codebooks = one.constants["lobcq_cache_codebooks"]
    rotation = {name: CacheFormat().rotation(32, name) for name in ("weight", "activation")}
    assert not torch.equal(*rotation.values())

    def rows_of(states, place):
        rotated = states @ rotation["weight"] if rotate_keys and place == 0 else states
        return lobcq.quantize_states(rotated, codebooks, 32)

    def decoded(rows, place):
        found = lobcq.dequantize_states(rows, codebooks, 2, 32, 32, torch.float32)
        return found @ rotation["activation"] if rotate_keys and place == 0 else found

    for batch, past in ((2, 5), (3, 0), (4, 9)):
        x, *states = operands(batch, past)
        rows = [rows_of(state, place) for place, state in enumerate(states)]
        out, *grown = run(graph_module, x, *rows, *one.constants.values())
        for place, new in enumerate((x, -x)):
            assert torch.equal(grown[place], torch.cat((rows[place], rows_of(new, place)), dim=1))
        keys, vals = (decoded(one, place) for place, one in enumerate(grown))
        torch.testing.assert_close(out, keys @ vals.mT)
        assert not torch.allclose(out, model(x, *states)[0])  # rounding is visible
    x, *states = operands()
    rows = [rows_of(state, place) for place, state in enumerate(states)]
    assert_metadata(graph_module, x, *rows, *one.constants.values())
    assert not one(graph_module).modified


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Attention(lambda past, keys, values: keys @ values.mT + past.sum()), "reads the cached keys or values"),
        (Attention(append=lambda past, new: torch.cat((new, past), -2)), "does not append"),
        (Attention(append=lambda past, new: torch.cat((past, new, new), -2)), "does not append"),
        (Attention(append=lambda past, new: torch.cat((past, new), -2) + 1), "does not append"),
    ],
    ids=["read by itself", "put before", "appended twice", "changed"],
)  # fmt: skip
def test_other_caches_are_refused(model, reason):
    graph_module = traced(model)
    refusals = quantize_cache()(graph_module).refusals
    assert reason in refusals[0].reason
    assert refusals[0].layer
    assert_unchanged(quantize_cache(), graph_module)


class InPlace(nn.Module):
    """The same over memory of a fixed size, whose last input says where `write` puts the call's own."""

    def __init__(self, write=lambda state, positions, new: state.index_copy_(2, positions, new)):
        super().__init__()
        self.write = write

    def forward(self, x, key, value, positions):
        return self.write(key, positions, x) @ self.write(value, positions, -x).mT


def in_place_operands(batch=2, length=7, first=2):
    x, key, value = operands(batch, length)
    return x, key, value, torch.arange(first, first + 3)


def test_states_are_written_to_rows_in_place():
    graph_module = trace_module(InPlace(), in_place_operands()).graph_module
    one = QuantizeCache(CacheFormat(FormatSpec(), False), HEADS, torch.float32, static=True)
    assert len(nodes(graph_module, aten.index_copy_.default)) == 2
    assert one(graph_module).modified
    codebooks = one.constants["lobcq_cache_codebooks"]
    for batch, length, first in ((2, 7, 2), (3, 9, 0)):
        x, *states, positions = in_place_operands(batch, length, first)
        rows = [lobcq.quantize_states(state, codebooks, 32) for state in states]
        before = [one.clone() for one in rows]
        out = run(graph_module, x, *rows, positions, codebooks)
        for was, now, new in zip(before, rows, (x, -x), strict=True):
            assert torch.equal(now, was.index_copy_(1, positions, lobcq.quantize_states(new, codebooks, 32)))
        keys, vals = (lobcq.dequantize_states(one, codebooks, 2, 32, 32, torch.float32) for one in rows)
        torch.testing.assert_close(out if isinstance(out, torch.Tensor) else out[0], keys @ vals.mT)
    assert not one(graph_module).modified


@pytest.mark.parametrize(
    "write",
    [
        lambda state, positions, new: state.index_copy_(3, positions, new[..., :1, :3].expand(-1, -1, 7, -1)),
        lambda state, positions, new: state.index_copy(2, positions, new),
        lambda state, positions, new: state.sum() + state.index_copy_(2, positions, new),
    ],
    ids=["columns", "a copy", "read by itself"],
)
def test_other_ways_to_write_are_refused(write):
    graph_module = trace_module(InPlace(write), in_place_operands()).graph_module
    one = QuantizeCache(CacheFormat(FormatSpec(), False), HEADS, torch.float32, static=True)
    reason = one(graph_module).refusals[0].reason
    assert "does not write" in reason or "reads the cached keys or values elsewhere" in reason
    assert_unchanged(one, graph_module)
