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
