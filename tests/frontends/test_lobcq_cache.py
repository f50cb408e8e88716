"""Caches in LO-BCQ: quantized and float models against one whose cache holds decoded floats."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import lobcq_fx
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CallError, ConfigError
from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, universal_codebooks
from lobcq_fx.frontends.lobcq_cache import LobcqCache
from lobcq_fx.frontends.output_types import CACHE_NAME
from tests.families import EVERY_CAUSAL_LM, causal_lm, fake_quantized, quantized_causal_lm, quantized_layers
from tests.frontends.test_causal_lm_families import LENGTH, assert_logits_close, batch
from tests.sweeps import sweep

pytestmark = pytest.mark.usefixtures("traced_once")

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def sylvester(width):
    """A Hadamard matrix in blocks of the largest power of two that divides the width."""
    size = width & -width
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])
    return torch.block_diag(*[signs] * (width // size))


def coded(states, spec, rotate):
    """What states [B, H, T, D] decode to, by the format alone."""
    rotation = sylvester(states.shape[-1]) if rotate else torch.eye(states.shape[-1])
    rotated = states @ rotation
    scale = absmax_row_scale(rotated.transpose(1, 2).flatten(2))[:, None].expand(-1, states.shape[1], -1, -1)
    one = encode(rotated.flatten(0, 2), spec, universal_codebooks(spec.num_codebooks), scale.reshape(-1, 1))
    return decode(one).view(states.shape) @ torch.linalg.inv(rotation)


class DecodedCache(DynamicCache):
    """A growing cache of floats, each rounded once by the format."""

    def __init__(self, spec, rotate_keys):
        super().__init__()
        self.spec, self.rotate_keys = spec, rotate_keys

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        states = coded(key_states, self.spec, self.rotate_keys), coded(value_states, self.spec, False)
        return super().update(*states, layer_idx, *args, **kwargs)


def pieces(model, cache, ids, mask, positions):
    """Logits of a prompt, a continuation of several tokens, and steps."""
    bounds = ((0, 6), (6, 9), (9, 10), (10, 11))
    outs = []
    for a, b in bounds:
        extra = {} if positions is None else {"position_ids": positions[:, a:b]}
        outs.append(model(input_ids=ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, **extra).logits)
    return torch.cat(outs, dim=1)


def positions_of(q, mask):
    return (mask.cumsum(-1) - 1).clamp(min=0) if "position_ids" in q.calling.inputs else None


@torch.no_grad()
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("family", EVERY_CAUSAL_LM)
def test_logits_are_those_of_a_cache_of_decoded_floats(family, rotate):
    """Sliding windows (mistral, gemma) and attention that is written out (gemma2's softcap) included."""
    model, q = quantized_causal_lm(family)
    _, key, value = q.calling.cache_heads[0]
    assert key == value
    spec = {18: FormatSpec(8, 32), 16: FormatSpec(8, 16)}[key]
    ids, mask = batch(3)
    positions = positions_of(q, mask)
    with fake_quantized(model, quantized_layers(q)):
        expected = pieces(model, DecodedCache(spec, rotate), ids, mask, positions)
        in_float = pieces(model, DynamicCache(), ids, mask, positions)
        with_rows = pieces(model, LobcqCache(rotate_keys=rotate), ids, mask, positions)
    assert (expected - in_float).abs().median() > 1e-2 * expected.std()  # the cache's rounding is visible at all
    assert_logits_close(with_rows, expected, mask)
    cache = LobcqCache(rotate_keys=rotate)
    assert_logits_close(pieces(q, cache, ids, mask, positions), expected, mask)
    assert cache.get_seq_length() == LENGTH
    states = sum(layer_heads * 2 for layer_heads, _, _ in q.calling.cache_heads)
    head_bytes = 19 if key == 18 else 10  # codes, selectors and scales of 32 or 16 scalars
    assert cache.nbytes == 3 * LENGTH * (states * head_bytes + 2 * len(cache.layers) * 4)


@pytest.fixture
def pair(traced_once):
    return quantized_causal_lm("llama")


@pytest.fixture
def q(pair):
    return pair[1]


@torch.no_grad()
def test_a_prompt_in_pieces_gives_what_it_gives_whole(q):
    """Attention reads the call's own tokens as they are cached, too."""
    ids, mask = batch(2)
    whole = LobcqCache()
    expected = q(ids, attention_mask=mask, past_key_values=whole).logits
    parts = LobcqCache()
    assert_logits_close(pieces(q, parts, ids, mask, None), expected, mask)
    assert all(torch.equal(a.values[1], b.values[1]) for a, b in zip(whole.layers[:1], parts.layers[:1], strict=True))


@pytest.mark.parametrize(
    "way",
    [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}, {"prefill_chunk_size": 4}],
    ids=lambda way: next(iter(way), "greedy"),
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generate_gives_the_float_model_s_tokens(family, way):
    model, q = quantized_causal_lm(family)
    ids, mask = batch(3, seed=1)
    settings = {**GREEDY, **way, "attention_mask": mask}
    with fake_quantized(model, quantized_layers(q)):
        expected = model.generate(ids, **{CACHE_NAME: LobcqCache()}, **settings)
    assert torch.equal(q.generate(ids, **{CACHE_NAME: LobcqCache()}, **settings), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_attention_in_integers_is_attention_but_for_its_rounding(family):
    q = quantized_causal_lm(family)[1]
    ids, mask = batch(3)
    positions = positions_of(q, mask)
    expected = pieces(q, LobcqCache(), ids, mask, positions)
    actual = pieces(q, LobcqCache(attention="w4a8"), ids, mask, positions)
    error = (actual - expected)[mask.bool()]
    assert 0 < error.std() < 0.25 * expected.std()  # codes of what follows flip with it
    whole = {} if positions is None else {"position_ids": positions}
    at_once = q(ids, attention_mask=mask, past_key_values=LobcqCache(attention="w4a8"), **whole).logits
    assert_logits_close(actual, at_once, mask)


def test_attention_in_integers_is_refused_where_it_cannot_be(q):
    ids, _ = batch(2)
    with pytest.raises(CallError, match=r"this model's own attention multiplies floats: leave attention out"):
        causal_lm("llama")(ids, past_key_values=LobcqCache(attention="w4a8"))
    softcapped = quantized_causal_lm("gemma2")[1]
    with pytest.raises(CallError, match=r"not only scaled_dot_product_attention reads .*Remedy: attention='w4a16'"):
        softcapped(ids, past_key_values=LobcqCache(attention="w4a8"))
    with pytest.raises(ConfigError, match=r"attention='w4a4': use one of"):
        LobcqCache(attention="w4a4")


@torch.no_grad()
def test_a_model_that_is_configured_for_it_makes_it_by_itself(q, tmp_path):
    configured = lobcq_fx.quantize(causal_lm("llama"), config=LobcqConfig(kv_cache="16x16"), static_cache=False)
    configured.save_pretrained(tmp_path / "q")
    loaded = lobcq_fx.load(tmp_path / "q")
    ids, mask = batch(2)
    settings = {**GREEDY, "attention_mask": mask}
    expected = q(ids, attention_mask=mask, past_key_values=LobcqCache("16x16")).logits
    tokens = q.generate(ids, **{CACHE_NAME: LobcqCache("16x16")}, **settings)
    for model in (configured, loaded):
        out = model(ids, attention_mask=mask)
        assert type(out[CACHE_NAME]) is LobcqCache
        assert torch.equal(out.logits, expected)
        assert torch.equal(model.generate(ids, **settings), tokens)
        found = model.generate(ids, return_dict_in_generate=True, **settings)
        assert type(found[CACHE_NAME]) is LobcqCache
    in_float = q(ids, attention_mask=mask).logits  # where floats are asked for, they are kept
    assert torch.equal(loaded(ids, attention_mask=mask, use_cache=False).logits, in_float)
    assert torch.equal(loaded(ids, attention_mask=mask, past_key_values=DynamicCache()).logits, in_float)
    growing = {"cache_implementation": "dynamic", **settings}
    assert torch.equal(loaded.generate(ids, **growing), q.generate(ids, **growing))
    assert torch.equal(loaded.generate(ids, use_cache=False, **settings), q.generate(ids, use_cache=False, **settings))


def test_generate_goes_on_with_a_cache_of_the_caller_s(q):
    ids, _ = batch(2)
    settings = {**GREEDY, "max_new_tokens": 4, CACHE_NAME: LobcqCache()}
    both = q.generate(q.generate(ids, **settings), **settings)
    assert torch.equal(both, q.generate(ids, **{**GREEDY, "max_new_tokens": 8, CACHE_NAME: LobcqCache()}))


@torch.no_grad()
def test_rows_are_cropped_reordered_repeated_and_selected_as_floats_are(q):
    ids, mask = batch(3)

    def after(change, start_ids, start_mask):
        cache = LobcqCache()
        q(start_ids[:, :8], attention_mask=start_mask[:, :8], past_key_values=cache)
        change(cache)
        return cache

    def step(cache, ids, mask):
        return q(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits

    def same(cache, order):
        expected = after(lambda cache: None, ids[order], mask[order])
        torch.testing.assert_close(step(cache, ids[order], mask[order]), step(expected, ids[order], mask[order]))

    same(after(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), ids, mask), [2, 0, 0])
    same(after(lambda cache: cache.batch_repeat_interleave(2), ids, mask), [0, 0, 1, 1, 2, 2])
    same(after(lambda cache: cache.batch_select_indices([1, 2]), ids, mask), [1, 2])
    longer = LobcqCache()
    q(ids, attention_mask=mask, past_key_values=longer)
    longer.crop(-3)
    assert longer.get_seq_length() == 8
    same(longer, [0, 1, 2])
    longer.reset()
    assert (longer.get_seq_length(), longer.nbytes) == (0, 0)
    q(ids[:, :8], attention_mask=mask[:, :8], past_key_values=longer)
    same(longer, [0, 1, 2])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["w4a8", "w4a16"])
def test_compiled_steps_are_one_graph_without_a_break(q, attention):
    ids, _ = batch(2)
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    step = torch.compile(q, fullgraph=True, backend=backend, dynamic=True)
    caches = LobcqCache(), LobcqCache()
    for cache in caches:
        q(ids[:, :5], past_key_values=cache)  # the prompt, uncompiled: what serves the cache is made by the first call
    for place in range(5, LENGTH):
        token = ids[:, place : place + 1]
        actual, expected = step(token, past_key_values=caches[0]), q(token, past_key_values=caches[1])
        torch.testing.assert_close(actual.logits, expected.logits)
    assert caches[0].get_seq_length() == LENGTH
    assert len(graphs) == 1


@torch.no_grad()
def test_a_model_that_is_configured_for_attention_in_integers(q, tmp_path):
    config = LobcqConfig(kv_cache="8x64", attention="w4a8")
    lobcq_fx.quantize(causal_lm("llama"), config=config, static_cache=False).save_pretrained(tmp_path / "q")
    ids, mask = batch(2)
    settings = {**GREEDY, "attention_mask": mask}
    loaded = lobcq_fx.load(tmp_path / "q")
    expected = q(ids, attention_mask=mask, past_key_values=LobcqCache(attention="w4a8")).logits
    assert torch.equal(loaded(ids, attention_mask=mask).logits, expected)
    tokens = q.generate(ids, **{CACHE_NAME: LobcqCache(attention="w4a8")}, **settings)
    assert torch.equal(loaded.generate(ids, **settings), tokens)


@torch.no_grad()
def test_a_call_that_is_not_to_cache_leaves_the_cache(q):
    ids, mask = batch(2)
    cache = LobcqCache()
    q(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    out = q(ids[:, 6:], attention_mask=mask, past_key_values=cache, use_cache=False)
    assert (out.past_key_values, cache.get_seq_length()) == (None, 6)


@torch.no_grad()
def test_what_the_graph_cannot_serve_is_refused(q):
    ids, mask = batch(2)
    cache = LobcqCache()
    q(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(CallError, match=r"holds 2 layers of \[2, 11, 42\] .* needs 2 of \[3, 11, 42\]"):
        q(torch.ones(3, 1, dtype=torch.long), past_key_values=cache)
    with pytest.raises(CallError, match=r"attention_mask has shape \[2, 11\]: pass \[2, 12\]"):
        q(ids[:, :1], attention_mask=mask, past_key_values=cache)
    other = quantized_causal_lm("opt")[1]
    with pytest.raises(CallError, match=r"holds 2 layers of .* needs 1 of .*pass a new LobcqCache"):
        other(ids[:, :1], past_key_values=cache)
    with pytest.raises(ConfigError, match="num_codebooks=9"):
        LobcqCache("9x64")


@torch.no_grad()
def test_saved_models_of_any_age_take_it(q, tmp_path):
    """What serves it is made of the saved graph for growing caches: nothing else is saved for it."""
    q.save_pretrained(tmp_path / "q")
    loaded = lobcq_fx.load(tmp_path / "q")
    ids, mask = batch(2)
    expected = q(ids, attention_mask=mask, past_key_values=LobcqCache()).logits
    assert torch.equal(loaded(ids, attention_mask=mask, past_key_values=LobcqCache()).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(
        lobcq_fx.load(tmp_path / "again")(ids, attention_mask=mask, past_key_values=LobcqCache()).logits, expected
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", sweep([torch.bfloat16, torch.float16], [torch.bfloat16]))
def test_half_precision(dtype):
    model = causal_lm("llama").to(dtype)
    q = lobcq_fx.quantize(model, static_cache=False)
    ids, mask = batch(2)
    cache = LobcqCache(rotate_keys=True)
    logits = q(ids, attention_mask=mask, past_key_values=cache).logits
    in_float = quantized_causal_lm("llama")[1](ids, attention_mask=mask, past_key_values=LobcqCache()).logits
    assert logits.dtype == dtype
    # Against fp32: of the model's own rounding and of codes that flip with it; a wrong state is off by the spread.
    assert (logits.float() - in_float)[mask.bool()].std() < 0.35 * in_float.std()
    assert q(ids[:, :1], past_key_values=cache).logits.isfinite().all()


def test_float_models_take_it():
    model, cache = causal_lm("llama"), LobcqCache()
    model.generate(torch.tensor([[5, 6, 7]]), **{CACHE_NAME: cache}, **GREEDY)
    assert cache.get_seq_length() == 3 + 12 - 1
    assert all(layer.keys.dtype == torch.uint8 for layer in cache.layers)
