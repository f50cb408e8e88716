"""The cache that appends in place: what a DynamicCache holds and gives, whatever is done to it between calls."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.output_types import CACHE_NAME
from lobcq_fx.frontends.reserving_cache import LEAST_SPARE, ReservingCache, ReservingLayer
from tests.families import EVERY_WITH_STATIC_CACHE, VOCABULARY, causal_lm, quantized_causal_lm
from tests.frontends.test_causal_lm_families import assert_logits_close, batch

pytestmark = pytest.mark.usefixtures("traced_once")

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
BOUNDS = ((0, 6), (6, 9), (9, 10), (10, 11))


@pytest.fixture
def llama():
    return quantized_causal_lm("llama")[1]


def tokens(size, length, seed=0):
    return torch.randint(3, VOCABULARY, (size, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, cache, mask=None):
    return model(ids, past_key_values=cache, attention_mask=mask).logits


@torch.no_grad()
@pytest.mark.parametrize("family", EVERY_WITH_STATIC_CACHE)
@pytest.mark.parametrize("size", [1, 3])
def test_logits_are_those_with_a_dynamic_cache(family, size):
    q, (ids, mask) = quantized_causal_lm(family)[1], batch(size)
    caches = ReservingCache(), DynamicCache()
    for a, b in BOUNDS:
        actual, expected = (logits(q, ids[:, a:b], one, mask[:, :b]) for one in caches)
        assert_logits_close(actual, expected, mask[:, a:b])
    for actual, expected in zip(*(one.layers for one in caches), strict=True):
        torch.testing.assert_close(actual.keys, expected.keys)
        torch.testing.assert_close(actual.values, expected.values)


@pytest.mark.parametrize("family", EVERY_WITH_STATIC_CACHE)
def test_models_whose_layers_are_all_whole_make_one(family):
    q = quantized_causal_lm(family)[1]
    slides = bool(q.calling.windows)
    ids = tokens(1, 5)
    with torch.no_grad():
        made = q(ids).past_key_values, q.generate(ids, return_dict_in_generate=True, **GREEDY).past_key_values
    assert [isinstance(one, ReservingCache) for one in made] == [not slides] * 2
    assert slides == (family in ("mistral", "gemma2", "gemma3"))


@torch.no_grad()
def test_steps_write_where_the_prompt_lies_until_the_memory_is_full(llama):
    cache = ReservingCache()
    logits(llama, tokens(2, 7), cache)
    address = cache.layers[0].keys.data_ptr()
    for _ in range(3):
        logits(llama, tokens(2, 1), cache)
        assert cache.layers[0].keys.data_ptr() == address
    full = DynamicCache()
    for one in (cache, full):
        one.reset()
        for a, b in ((0, LEAST_SPARE), (LEAST_SPARE, LEAST_SPARE + 300), (LEAST_SPARE + 300, LEAST_SPARE + 303)):
            last = logits(llama, tokens(1, LEAST_SPARE + 303)[:, a:b], one)[:, -1]
        one.last = last
    torch.testing.assert_close(cache.last, full.last)


@torch.no_grad()
def test_copies_go_on_by_themselves(llama):
    """Layers that are copied share memory, of which only the first to append may go on in it."""
    prompt, left, right = tokens(1, 6), tokens(1, 2, seed=1), tokens(1, 2, seed=2)
    cache = ReservingCache()
    logits(llama, prompt, cache)
    forks = [copy.copy(cache), copy.copy(cache), copy.deepcopy(cache)]
    for fork in forks[:2]:
        fork.layers = [copy.copy(layer) for layer in cache.layers]
    for _ in range(2):  # by turns
        for fork, more in zip(forks, (left, right, right), strict=True):
            logits(llama, more, fork)
    for fork, more in zip(forks, (left, right, right), strict=True):
        expected = DynamicCache()
        logits(llama, torch.cat((prompt, more, more), 1), expected)
        torch.testing.assert_close(fork.layers[-1].values, expected.layers[-1].values, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 6


CHANGES = {
    "crop": lambda cache: cache.crop(-3),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "reset": lambda cache: cache.reset(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_what_generation_does_to_a_cache(llama, change):
    results = []
    for cache in (ReservingCache(), DynamicCache()):
        logits(llama, tokens(2, 8), cache)
        CHANGES[change](cache)
        size = {"repeat": 4, "select": 1}.get(change, 2)
        for seed in (1, 2):
            last = logits(llama, tokens(size, 1, seed), cache)
        results.append((last, cache.get_seq_length()))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_generate_writes_what_it_writes_with_a_dynamic_cache(llama, settings):
    ids = tokens(1 if "prompt_lookup_num_tokens" in settings else 2, 9)
    written = []
    for cache in ({}, {CACHE_NAME: DynamicCache()}):
        torch.manual_seed(0)
        written.append(llama.generate(ids, **{**GREEDY, **settings, **cache}))
    assert torch.equal(*written)


@torch.no_grad()
def test_a_float_model_takes_it_too():
    model, results = causal_lm("llama"), []
    for cache in (ReservingCache(), DynamicCache()):
        for a, b in BOUNDS:
            last = logits(model, tokens(2, 11)[:, a:b], cache)
        results.append(last)
    torch.testing.assert_close(*results)  # torch's attention sums in an order that depends on how the states lie


def test_memory_of_inference_mode_is_left_there(llama):
    """Outside of it torch refuses to write to tensors that were made inside."""
    ids, results = tokens(1, 9), []
    for cache in (ReservingCache(), DynamicCache()):
        with torch.inference_mode():
            logits(llama, ids[:, :7], cache)
        with torch.no_grad():
            logits(llama, ids[:, 7:8], cache)
            results.append(logits(llama, ids[:, 8:], cache))
    torch.testing.assert_close(*results)


@torch.no_grad()
def test_a_compiled_step_goes_on_from_it(llama):
    step = torch.compile(llama, fullgraph=True, dynamic=True, backend="eager")
    ids, results = tokens(2, 11), []
    for call, cache in ((step, ReservingCache()), (llama, DynamicCache())):
        logits(llama, ids[:, :8], cache)
        for a in range(8, 11):
            last = logits(call, ids[:, a : a + 1], cache)
        results.append(last)
    torch.testing.assert_close(*results)
    assert not any(type(layer) is ReservingLayer for layer in cache.layers)


@torch.no_grad()
def test_a_call_that_is_refused_leaves_it_as_it_was(llama):
    cache, other = ReservingCache(), DynamicCache()
    for one in (cache, other):
        logits(llama, tokens(2, 6), one)
    with pytest.raises(CallError, match=r"past_key_values holds 2 layers of \[2, 2, 18\] \[batch, heads, width\]"):
        logits(llama, tokens(3, 1), cache)
    with pytest.raises(CallError, match=r"attention_mask has shape \[2, 3\]"):
        logits(llama, tokens(2, 1), cache, torch.ones(2, 3, dtype=torch.long))
    llama(tokens(2, 1), past_key_values=cache, use_cache=False)
    assert cache.get_seq_length() == 6
    torch.testing.assert_close(*(logits(llama, tokens(2, 1), one) for one in (cache, other)))
