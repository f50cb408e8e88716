"""Layers that slide a window keep what it can still see: tokens and logits are those of the fake-quantized original."""

from __future__ import annotations

import functools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import lobcq_fx
from lobcq_fx import LobcqCache
from lobcq_fx.errors import CallError, TraceError
from lobcq_fx.frontends import transformers_trace
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.frontends.growing_cache import check_windows
from lobcq_fx.frontends.output_types import CACHE_NAME
from tests.families import VOCABULARY, causal_lm, fake_quantized, quantized_causal_lm, quantized_layers
from tests.frontends.test_causal_lm_families import assert_logits_close
from tests.frontends.test_vision_language import generated, pair_of
from tests.vision_language import IMAGE

WINDOW, LENGTH = 4, 23
FAMILIES = ["mistral", "gemma2"]
"""All layers slide, and every other one: their windows are WINDOW."""

SETTINGS = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=FAMILIES)
def pair(request, traced_once):
    return quantized_causal_lm(request.param)


@pytest.fixture
def mixed(traced_once):
    return quantized_causal_lm("gemma2")


def prompt(rows=3, length=LENGTH, padding=3):
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids * mask, mask


def own_cache(model):
    """The cache that `generate()` makes."""
    return transformers.DynamicCache(config=model.config)


def kept(cache):
    return [layer.keys.shape[2] for layer in cache.layers]


def nbytes(cache):
    return sum(state.nbytes for layer in cache.layers for state in (layer.keys, layer.values))


def by_pieces(called, ids, mask, cache, stops):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, start = [], 0
    for stop in stops:
        part = slice(start, stop)
        tokens = {"input_ids": ids[:, part], "attention_mask": mask[:, :stop], "position_ids": positions[:, part]}
        # Clones, as in generate(): compiled calls depend on what a view is of.
        call = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tokens.items()}
        out = called(**call, **{CACHE_NAME: cache}, use_cache=True)
        logits.append(out.logits)
        cache, start = out[CACHE_NAME], stop
    return torch.cat(logits, dim=1), cache


PIECES = {
    "a short prompt, then steps": (2, *range(3, LENGTH + 1)),
    "as many as a window keeps, then pieces": (WINDOW - 1, WINDOW, 10, 12, 19, LENGTH),
    "a long prompt, then steps": (15, *range(16, LENGTH + 1)),
    "a long prompt, then a long one": (9, LENGTH - 1, LENGTH),
}


@torch.no_grad()
@pytest.mark.parametrize("stops", PIECES.values(), ids=PIECES)
def test_logits_of_a_prompt_in_pieces_are_those_of_one_call_of_the_original(pair, stops):
    model, q = pair
    ids, mask = prompt(padding=9)  # more than a window
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with fake_quantized(model, quantized_layers(q)):
        expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        _, theirs = by_pieces(model, ids, mask, own_cache(model), stops)
    actual, cache = by_pieces(q, ids, mask, None, stops)
    assert_logits_close(actual, expected, mask)
    assert kept(cache) == kept(theirs)
    assert min(kept(cache)) == WINDOW - 1
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in theirs.layers]
    assert cache.get_seq_length() == LENGTH
    assert all(state.is_contiguous() for layer in cache.layers for state in (layer.keys, layer.values))


@torch.no_grad()
def test_a_cache_of_whole_layers_stays_whole_and_gives_the_same(pair):
    _, q = pair
    ids, mask = prompt()
    stops = (9, 10, 16, LENGTH)
    sliding, small = by_pieces(q, ids, mask, own_cache(q), stops)
    whole, large = by_pieces(q, ids, mask, transformers.DynamicCache(), stops)
    assert_logits_close(whole, sliding, mask)
    assert {type(layer) for layer in large.layers} == {DynamicLayer}
    assert kept(large) == [LENGTH] * len(large.layers)
    # Of the layers behind the first one, sums in another order may change the code of an activation.
    assert torch.equal(small.layers[0].keys, large.layers[0].keys[:, :, 1 - WINDOW :])


@torch.no_grad()
def test_bytes_of_a_cache_of_four_windows(pair):
    model, q = pair
    sizes = []
    for cache in (own_cache(q), transformers.DynamicCache()):
        q(prompt(1, 4 * WINDOW, 0)[0], **{CACHE_NAME: cache})
        sizes.append(nbytes(cache))
    sliding = [type(layer) is DynamicSlidingWindowLayer for layer in own_cache(model).layers]
    share = sum((WINDOW - 1) / (4 * WINDOW) if one else 1 for one in sliding) / len(sliding)
    assert sizes[0] == share * sizes[1]


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt in pieces": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("length", [2, 13])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_fake_quantized_model(mixed, way, length):
    """Of a model whose layers all slide: test_generation.py."""
    model, q = mixed
    ids, mask = prompt(3, length, 1)
    settings = {**SETTINGS, "attention_mask": mask, **WAYS[way]}
    out = q.generate(ids, return_dict_in_generate=True, **settings)
    with fake_quantized(model, quantized_layers(q), exact=True):
        assert torch.equal(out.sequences, model.generate(ids, **settings))
    assert kept(out[CACHE_NAME]) == [WINDOW - 1, length + SETTINGS["max_new_tokens"] - 1]


@pytest.mark.parametrize("helper", ["the prompt", "another model"])
def test_speculation_takes_tokens_back(pair, helper):
    model, q = pair
    ids, mask = prompt(1, 13, 0)
    settings = {**SETTINGS, "attention_mask": mask}
    # The float model, not faked, is often wrong.
    guessed = {"prompt_lookup_num_tokens": 3} if helper == "the prompt" else {"assistant_model": deepcopy(model)}
    out = q.generate(ids, return_dict_in_generate=True, **settings, **guessed)
    with fake_quantized(model, quantized_layers(q), exact=True):
        assert torch.equal(out.sequences, model.generate(ids, **settings))
    assert min(kept(out[CACHE_NAME])) == WINDOW - 1


def test_it_assists_a_float_model(pair):
    model, q = pair
    ids, mask = prompt(1, 9, 0)
    settings = {**SETTINGS, "attention_mask": mask}
    assert torch.equal(model.generate(ids, assistant_model=q, **settings), model.generate(ids, **settings))


def test_a_second_turn_goes_on_with_the_cache_of_the_first(pair):
    model, q = pair
    turns = []
    with fake_quantized(model, quantized_layers(q), exact=True):
        for called in (model, q):
            ids, mask = prompt(3, 9)
            cache = own_cache(called)
            for _ in range(2):
                ids = called.generate(ids, attention_mask=mask, **{CACHE_NAME: cache}, **SETTINGS)
                more = prompt(3, 6, 0)[0]
                ids = torch.cat((ids, more), dim=1)
                mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            turns.append(ids)
    assert torch.equal(*turns)


@torch.no_grad()
def test_caches_pass_between_the_original_and_the_quantized_model(pair):
    model, q = pair
    ids, mask = prompt()
    for first, second in ((model, q), (q, model)):
        _, cache = by_pieces(first, ids, mask, own_cache(first), (9, 12))
        out = second(ids[:, 12:], attention_mask=mask, **{CACHE_NAME: cache})
        assert kept(out[CACHE_NAME]) == [WINDOW - 1 if one.is_sliding else LENGTH for one in own_cache(q).layers]
        assert out[CACHE_NAME].get_seq_length() == LENGTH
        assert out.logits.isfinite().all()


@torch.no_grad()
def test_tokens_are_taken_back_as_transformers_does_it(pair):
    """Past the window only while the cache records its past, which it does until it is cropped."""
    _, q = pair
    ids, mask = prompt()
    expected, _ = by_pieces(q, ids, mask, own_cache(q), (15, LENGTH))
    cache = own_cache(q)
    cache.activate_past_recording()
    q(ids[:, :15], attention_mask=mask[:, :15], **{CACHE_NAME: cache})
    wrong = torch.full_like(ids[:, :4], 5)
    q(wrong, attention_mask=mask[:, :19], **{CACHE_NAME: cache})
    assert kept(cache) == [19] * len(cache.layers)
    cache.crop(-4)
    actual = q(ids[:, 15:], attention_mask=mask, **{CACHE_NAME: cache}).logits
    assert_logits_close(actual, expected[:, 15:], mask[:, 15:])
    with pytest.raises(RuntimeError, match="does not track past states"):
        by_pieces(q, ids, mask, own_cache(q), (15,))[1].crop(-1)
    short = by_pieces(q, ids, mask, own_cache(q), (WINDOW - 1,))[1]
    short.crop(-1)
    assert short.get_seq_length() == WINDOW - 2


@torch.no_grad()
def test_rows_are_reordered_repeated_and_selected(mixed):
    _, q = mixed
    ids, mask = prompt()
    order = torch.tensor([2, 0, 1])
    _, cache = by_pieces(q, ids, mask, own_cache(q), (9,))
    cache.reorder_cache(order)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[order, 9:]
    actual = q(ids[order, 9:], attention_mask=mask[order], position_ids=positions, **{CACHE_NAME: cache}).logits
    expected, _ = by_pieces(q, ids[order], mask[order], own_cache(q), (9, LENGTH))
    assert_logits_close(actual, expected[:, 9:], mask[order, 9:])


@pytest.mark.nightly
def test_images_and_a_second_turn_with_some():
    """Gemma 3, of which every other layer slides."""
    of_images, turns = pair_of("gemma3"), []
    for model in (of_images.model, of_images.q):
        with of_images.fake():
            cache = own_cache(model)
            first = generated(model, of_images.call, **{CACHE_NAME: cache})
            ids = torch.cat((first, of_images.call["input_ids"]), dim=1)
            seen = of_images.call["attention_mask"]
            answer = torch.ones_like(first[:, seen.shape[1] :])
            call = of_images.call | {
                "input_ids": ids,
                "attention_mask": torch.cat((seen, answer, seen), dim=1),
                "token_type_ids": (ids == IMAGE).long(),
            }
            turns.append(generated(model, call, **{CACHE_NAME: cache}))
            assert kept(cache) == [WINDOW - 1, turns[-1].shape[1] - 1]
    assert torch.equal(*turns)


@torch.no_grad()
@pytest.mark.parametrize("whose", ["quantized", "float"])
def test_encoded_keys_and_values_slide_too(pair, whose):
    """To those of a cache that is whole, which has other tests."""
    model, q = pair
    called = q if whose == "quantized" else model
    ids, mask = prompt()
    stops = (2, 3, 4, 11, 12, LENGTH)
    expected, whole = by_pieces(called, ids, mask, LobcqCache(), stops)
    actual, cache = by_pieces(called, ids, mask, LobcqCache(config=q.config), stops)
    assert_logits_close(actual, expected, mask)
    sliding = [one.is_sliding for one in own_cache(q).layers]
    lengths = [WINDOW - 1 if one else LENGTH for one in sliding]
    assert [layer.keys.shape[1] for layer in cache.layers] == lengths
    assert cache.nbytes * LENGTH * len(lengths) == whole.nbytes * sum(lengths)
    assert torch.equal(cache.layers[0].keys, whole.layers[0].keys[:, 1 - WINDOW :])


@torch.no_grad()
def test_encoded_tokens_are_taken_back(pair):
    _, q = pair
    ids, mask = prompt(1, 13, 0)
    settings = {**SETTINGS, "attention_mask": mask}
    caches = [LobcqCache(), LobcqCache(config=q.config)]
    expected = q.generate(ids, **{CACHE_NAME: caches[0]}, **settings)
    assert torch.equal(q.generate(ids, **{CACHE_NAME: caches[1]}, prompt_lookup_num_tokens=3, **settings), expected)
    beams = [
        q.generate(ids, **{CACHE_NAME: cache}, num_beams=3, **settings)
        for cache in (LobcqCache(), LobcqCache(config=q.config))
    ]
    assert torch.equal(*beams)
    caches[1].reset()
    assert torch.equal(q.generate(ids, **{CACHE_NAME: caches[1]}, **settings), expected)


def test_a_model_with_a_quantized_cache_of_its_own_slides(mixed):
    q = deepcopy(mixed[1])
    ids, mask = prompt()
    expected = q.generate(ids, attention_mask=mask, **{CACHE_NAME: LobcqCache()}, **SETTINGS)
    q.lobcq_config = replace(q.lobcq_config, kv_cache="8x64")
    out = q.generate(ids, attention_mask=mask, return_dict_in_generate=True, **SETTINGS)
    assert torch.equal(out.sequences, expected)
    total = LENGTH + SETTINGS["max_new_tokens"] - 1
    assert [layer.keys.shape[1] for layer in out[CACHE_NAME].layers] == [WINDOW - 1, total]


@torch.no_grad()
@pytest.mark.nightly
def test_compiled_steps_share_their_graphs():
    _, q = quantized_causal_lm("mistral")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend=counter)
    ids, mask = prompt(7)
    counts = []
    for stops in ((2, *range(3, 12)), (13, *range(14, 18))):
        expected, own = by_pieces(q, ids, mask, own_cache(q), stops)
        actual, cache = by_pieces(compiled, ids, mask, own_cache(q), stops)
        torch.testing.assert_close(actual, expected)
        assert kept(cache) == kept(own)
        counts.append(counter.frame_count)
    # A prompt within the window and one past it; a step within, and all that follow the one past it.
    assert counts == [3, 4]
    torch._dynamo.reset()


@torch.no_grad()
def test_saved_models_keep_windows(mixed, tmp_path):
    _, q = mixed
    ids, mask = prompt()
    q.save_pretrained(tmp_path / "q")
    loaded = lobcq_fx.load(tmp_path / "q")
    assert loaded.calling.windows == q.calling.windows == (WINDOW, None)
    expected = q.generate(ids, attention_mask=mask, **SETTINGS)
    assert torch.equal(loaded.generate(ids, attention_mask=mask, **SETTINGS), expected)


@functools.cache
def of_whole_layers():
    """What a model becomes that cannot be traced with windows, which earlier releases traced no model with."""

    def refuse(model, cache, windows):
        if windows:
            raise TraceError("no")
        return sliding(model, cache, windows)

    sliding = transformers_trace.sliding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_trace, "sliding", refuse)
        return lobcq_fx.quantize(causal_lm("mistral"), static_cache=False)


@torch.no_grad()
def test_saved_models_of_earlier_releases_keep_whole_layers(traced_once, tmp_path):
    _, q = quantized_causal_lm("mistral")
    ids, mask = prompt()
    expected = q.generate(ids, attention_mask=mask, **SETTINGS)
    of_whole_layers().save_pretrained(tmp_path / "old")
    assert "windows" not in (tmp_path / "old" / "graph.json").read_text()
    old = lobcq_fx.load(tmp_path / "old")
    out = old.generate(ids, attention_mask=mask, return_dict_in_generate=True, **SETTINGS)
    assert torch.equal(out.sequences, expected)
    assert {type(layer) for layer in out[CACHE_NAME].layers} == {DynamicLayer}
    encoded = LobcqCache(config=q.config)
    old.generate(ids, attention_mask=mask, **{CACHE_NAME: encoded}, **SETTINGS)
    assert {layer.keys.shape[1] for layer in encoded.layers} == {LENGTH + SETTINGS["max_new_tokens"] - 1}
    for cache, message in (
        (own_cache(q), "holds a DynamicSlidingWindowLayer; the graph grows DynamicLayers"),
        (LobcqCache(config=q.config), "pass a new LobcqCache"),
    ):
        _, filled = by_pieces(q, ids, mask, cache, (9,))
        with pytest.raises(CallError, match=message):
            old(ids[:, 9:], attention_mask=mask, **{CACHE_NAME: filled})


def layers_of(q, *layers):
    cache = own_cache(q)
    cache.layers = list(layers)
    return cache


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused(mixed):
    _, q = mixed
    ids = prompt(1, 6, 0)[0]
    wrong = {
        "of 3 where the model's window is 4": layers_of(q, DynamicSlidingWindowLayer(3), DynamicLayer()),
        "of 4 where the model's window is without an end": layers_of(q, *[DynamicSlidingWindowLayer(4)] * 2),
        "1 layers, the model 2": layers_of(q, DynamicLayer()),
    }
    encoded = LobcqCache(config=transformers.Gemma2Config(sliding_window=3, num_hidden_layers=2))
    wrong["a LobcqSlidingWindowLayer of 3 .* pass LobcqCache"] = encoded
    for message, cache in wrong.items():
        with pytest.raises(CallError, match=message):
            q(ids, **{CACHE_NAME: cache})
    cache = transformers.DynamicCache([(torch.zeros(1, 2, length, 8),) * 2 for length in (3, 6)])
    with pytest.raises(CallError, match=r"layers of \[3, 6\] positions that slide the same window"):
        check_windows(cache, (WINDOW, WINDOW))


@pytest.mark.parametrize("windows", [[4], [4, 4, None], [4, 5], [1, None], [None, None], ["4", None], [True, None]])
def test_damaged_windows_are_refused(mixed, windows):
    values = mixed[1].calling.to_dict()
    assert CausalLMCall.from_dict(values) == mixed[1].calling
    with pytest.raises(ValueError, match="windows are"):
        CausalLMCall.from_dict({**values, "windows": windows})


def test_a_model_that_cannot_be_traced_so_keeps_whole_layers():
    q = of_whole_layers()
    out = q.generate(prompt(1, 9, 0)[0], return_dict_in_generate=True, **SETTINGS)
    assert q.calling.windows == ()
    assert kept(out[CACHE_NAME]) == [18]
