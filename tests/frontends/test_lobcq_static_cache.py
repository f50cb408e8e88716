"""Caches in LO-BCQ of a fixed length, against those that grow: bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

import lobcq_fx
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CallError, ConfigError
from lobcq_fx.frontends.lobcq_cache import LobcqCache
from lobcq_fx.frontends.lobcq_static_cache import LobcqStaticCache, LobcqStaticLayer
from lobcq_fx.frontends.output_types import CACHE_NAME
from tests.families import EVERY_WITH_STATIC_CACHE, causal_lm, quantized_causal_lm
from tests.frontends.test_causal_lm_families import LENGTH, assert_logits_close, batch
from tests.frontends.test_static_cache import GREEDY, pieces

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture
def q():
    return quantized_causal_lm("llama")[1]


@torch.no_grad()
@pytest.mark.parametrize("family", EVERY_WITH_STATIC_CACHE)
def test_logits_are_those_with_a_cache_that_grows(family):
    """Attention that is written out (gemma2, bloom) decodes the whole memory, and sums over more zeros."""
    q = quantized_causal_lm(family)[1]
    ids, mask = batch(3)
    expected = pieces(q, LobcqCache(), ids, mask)
    cache = q.static_cache(40, kv_cache="8x64")
    assert isinstance(cache, LobcqStaticCache)
    assert_logits_close(pieces(q, cache, ids, mask), expected, mask)
    assert [int(layer.cumulative_length) for layer in cache.layers] == [LENGTH] * len(cache.layers)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["w4a8", "w4a16"])
@pytest.mark.parametrize(("size", "length"), [(1, LENGTH), (3, 90)])
def test_bits_are_those_with_a_cache_that_grows(q, attention, size, length):
    ids, mask = batch(size)
    growing = LobcqCache(attention=attention)
    expected = pieces(q, growing, ids, mask)
    cache = q.static_cache(length, kv_cache="8x64", attention=attention)
    looked = mask.bool()
    assert torch.equal(pieces(q, cache, ids, mask)[looked], expected[looked])
    for ours, theirs in zip(cache.layers, growing.layers, strict=True):
        assert torch.equal(ours.keys[:, :LENGTH], theirs.keys)
        assert not ours.values[:, LENGTH:].any()
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    assert cache.nbytes * LENGTH == growing.nbytes * length
    cache.reset()
    assert torch.equal(pieces(q, cache, ids, mask)[looked], expected[looked])
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses


def test_generate(q):
    ids, mask = batch(3, seed=1)
    for extra in ({}, {"num_beams": 3}):
        settings = {**GREEDY, **extra, "attention_mask": mask}
        expected = q.generate(ids, **{CACHE_NAME: LobcqCache()}, **settings)
        assert torch.equal(q.generate(ids, **{CACHE_NAME: q.static_cache(40, kv_cache="8x64")}, **settings), expected)


def test_a_model_that_is_configured_for_it_makes_it_by_itself(q):
    configured = lobcq_fx.quantize(causal_lm("llama"), config=LobcqConfig(kv_cache="16x16", attention="w4a8"))
    ids, mask = batch(2)
    settings = {**GREEDY, "attention_mask": mask}
    cache = LobcqCache("16x16", attention="w4a8")
    expected = q.generate(ids, **{CACHE_NAME: cache}, **settings)
    settings |= {"cache_implementation": "static", "return_dict_in_generate": True}
    found = configured.generate(ids, **settings)
    assert type(found[CACHE_NAME]) is LobcqStaticCache
    assert {type(layer) for layer in found[CACHE_NAME].layers} == {LobcqStaticLayer}
    assert torch.equal(found.sequences, expected)


@torch.no_grad()
def test_compiled_steps_are_one_graph_without_a_break(q):
    ids, _ = batch(2)
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    step = torch.compile(q, fullgraph=True, backend=backend)
    caches = [q.static_cache(20, 2, kv_cache="8x64", attention="w4a8") for _ in range(2)]
    for cache in caches:
        q(ids[:, :6], past_key_values=cache)
    for place in range(6, LENGTH):
        part = ids[:, place : place + 1]
        expected = q(part, past_key_values=caches[0]).logits
        torch.testing.assert_close(step(part, past_key_values=caches[1]).logits, expected)
    assert len(graphs) == 1
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(caches[0].layers, caches[1].layers, strict=True))


@torch.no_grad()
def test_what_it_cannot_serve_is_refused(q):
    ids, _ = batch(2)
    cache = q.static_cache(8, 2, kv_cache="8x64")
    with pytest.raises(CallError, match=r"the cache has room for 8 tokens, the call has 11"):
        q(ids, past_key_values=cache)
    with pytest.raises(CallError, match=r"a torch.uint8 of \[2, 8, 42\] .* of \[1, 8, 42\] \[batch, length, bytes\]"):
        q(ids[:1, :3], past_key_values=cache)
    with pytest.raises(CallError, match="has 3 layers, the model 2"):
        q(ids[:, :3], past_key_values=LobcqStaticCache(3, 8))
    with pytest.raises(CallError, match=r"LobcqStaticCache, which models from .* write to: pass a LobcqCache"):
        causal_lm("llama")(ids[:, :3], past_key_values=LobcqStaticCache(2, 8))
    with pytest.raises(ConfigError, match="pass kv_cache='8x64' too"):
        q.static_cache(8, attention="w4a8")
    without = lobcq_fx.quantize(causal_lm("llama"), static_cache=False)
    with pytest.raises(CallError, match="no graph for static caches"):
        without(ids[:, :3], past_key_values=without.static_cache(8, kv_cache="8x64"))
    assert type(q.static_cache(8)) is StaticCache
