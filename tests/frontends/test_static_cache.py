"""Static caches: every family's second graph against its first, and every call that it cannot serve."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer, StaticLayer

import lobcq_fx
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CallError, TraceError
from lobcq_fx.frontends.in_place_cache import InPlaceCache
from lobcq_fx.frontends.output_types import CACHE_NAME
from lobcq_fx.modules.packed_weight import PackedWeight
from lobcq_fx.plan import QuantizationPlan
from tests.families import EVERY_WITH_STATIC_CACHE, VOCABULARY, causal_lm, quantized_causal_lm
from tests.frontends.test_causal_lm_families import LENGTH, assert_logits_close, batch

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=EVERY_WITH_STATIC_CACHE)
def q(request, traced_once):
    return quantized_causal_lm(request.param)[1]


@pytest.fixture
def llama(traced_once):
    return quantized_causal_lm("llama")[1]


def pieces(q, cache, ids, mask, **extra):
    """Logits of a prompt, a continuation of several tokens, and steps."""
    bounds = ((0, 6), (6, 9), (9, 10), (10, 11))
    outs = [
        q(ids[:, a:b], attention_mask=None if mask is None else mask[:, :b], past_key_values=cache, **extra).logits
        for a, b in bounds
    ]
    return torch.cat(outs, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("size", "length"), [(1, LENGTH), (3, 40)])
def test_logits_are_those_with_a_growing_cache(q, size, length):
    ids, mask = batch(size)
    cache = q.static_cache(length)
    expected = pieces(q, transformers.DynamicCache(), ids, mask)
    assert_logits_close(pieces(q, cache, ids, mask), expected, mask)
    assert [int(layer.cumulative_length) for layer in cache.layers] == [LENGTH] * len(cache.layers)
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    cache.reset()
    assert_logits_close(pieces(q, cache, ids, mask), expected, mask)
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses


@torch.no_grad()
def test_a_call_without_a_mask_and_one_with_the_whole_cache_s_are_alike(q):
    ids, mask = batch(2)
    mask[:] = 1
    expected = pieces(q, transformers.DynamicCache(), ids, None)
    assert_logits_close(pieces(q, q.static_cache(15), ids, None), expected, mask)
    cache, whole = q.static_cache(15), torch.ones(2, 15, dtype=torch.long)
    actual = [q(part, attention_mask=whole, past_key_values=cache).logits for part in ids.split((6, 5), dim=1)]
    assert_logits_close(torch.cat(actual, dim=1), expected, mask)


def test_greedy_tokens_are_those_with_a_growing_cache(q):
    ids, mask = batch(3, seed=1)
    expected = q.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(q.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY), expected)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"prefill_chunk_size": 4}, {"num_return_sequences": 2}])
def test_generate_s_other_ways(llama, settings):
    ids, mask = batch(3, seed=1)
    settings = {**GREEDY, **settings, "attention_mask": mask}
    if "num_return_sequences" in settings:
        settings.update(do_sample=True, top_k=1)
    growing = {**settings, "cache_implementation": "dynamic"}
    expected = llama.generate(ids, **growing)
    assert torch.equal(llama.generate(ids, **settings, cache_implementation="static"), expected)


def test_generate_goes_on_with_a_cache_of_the_caller_s(llama):
    ids, _ = batch(2)
    cache = llama.static_cache(40)
    settings = {**GREEDY, "max_new_tokens": 4, CACHE_NAME: cache}
    both = llama.generate(llama.generate(ids, **settings), **settings)
    assert torch.equal(both, llama.generate(ids, **{**GREEDY, "max_new_tokens": 8}))


@torch.no_grad()
def test_default_positions_count_as_with_a_growing_cache(q):
    ids, mask = batch(3)
    options = {"labels": ids[:, :6], "logits_to_keep": 0}
    expected = q(ids[:, :6], attention_mask=mask[:, :6], **options)
    actual = q(ids[:, :6], attention_mask=mask[:, :6], past_key_values=q.static_cache(9, batch_size=3), **options)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-3, atol=1e-3)
    assert type(actual) is type(expected)
    short = q(ids, past_key_values=q.static_cache(LENGTH), logits_to_keep=2, use_cache=False)
    assert short.past_key_values is None
    assert short.logits.shape == (3, 2, VOCABULARY)


def shifted(cache, by):
    for layer in cache.layers:
        layer.cumulative_length.add_(by)
    return cache


def one_layer_less(cache):
    cache.layers = cache.layers[1:]
    return cache


def in_half(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
    return cache


def with_layer(cache, layer):
    cache.layers = [cache.layers[0], layer, *cache.layers[2:]]
    return cache


ROW = torch.ones(1, 6, dtype=torch.long)
REFUSED = {
    "a long prompt": (lambda q: {"past_key_values": q.static_cache(5)}, "room for 5 tokens, the call has 6"),
    "no room left": (
        lambda q: {"past_key_values": shifted(q.static_cache(8, batch_size=1), 3)},
        r"room for 8 tokens and holds 3, the call has 6 more: .*static_cache\(max_cache_len\), longer",
    ),
    "layers": (lambda q: {"past_key_values": one_layer_less(q.static_cache(8))}, "has 1 layers, the model 2"),
    "a layer of another kind": (
        lambda q: {"past_key_values": with_layer(q.static_cache(8), DynamicLayer())},
        "holds a DynamicLayer",
    ),
    "another batch": (
        lambda q: {"past_key_values": q.static_cache(8, batch_size=2)},
        r"a torch.float32 of \[2, 2, 8, 18\] for a call that needs a torch.float32 of \[1, 2, 8, 18\]",
    ),
    "another length in a layer": (
        lambda q: {"past_key_values": with_layer(q.static_cache(8), StaticLayer(9))},
        r"a torch.float32 of \[1, 2, 9, 18\] for a call that needs a torch.float32 of \[1, 2, 8, 18\]",
    ),
    "another dtype": (
        lambda q: {"past_key_values": in_half(q.static_cache(8, batch_size=1))},
        r"a torch.bfloat16 of \[1, 2, 8, 18\] for a call that needs a torch.float32",
    ),
    "a mask of four dimensions": (
        lambda q: {"past_key_values": q.static_cache(8), "attention_mask": ROW[:, None, None].bool()},
        r"has shape \[1, 1, 1, 6\]; the graph makes its own 4-D masks: pass a 2-D one of at most \[1, 8\]",
    ),
    "a mask that is too long": (
        lambda q: {"past_key_values": q.static_cache(8), "attention_mask": torch.ones(1, 9)},
        r"attention_mask has shape \[1, 9\]: pass \[1, 6\]",
    ),
    "a mask without the cached tokens": (
        lambda q: {"past_key_values": shifted(q.static_cache(9, batch_size=1), 2), "attention_mask": ROW},
        r"attention_mask has shape \[1, 6\]: pass \[1, 8\], cached tokens included, or \[1, 9\]",
    ),
    "a mask of another batch": (
        lambda q: {"past_key_values": q.static_cache(8), "attention_mask": ROW.repeat(2, 1)},
        r"has shape \[2, 6\]",
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_serve_is_refused(llama, case):
    make, message = REFUSED[case]
    call = make(llama)
    with pytest.raises(CallError, match=message):
        llama(torch.arange(3, 9)[None], **call)


def test_layers_that_forget_are_refused_and_generate_s_own_are_whole():
    q = quantized_causal_lm("gemma2")[1]
    cache = transformers.StaticCache(config=q.config, max_cache_len=9)
    with pytest.raises(CallError, match=r"holds a StaticSlidingWindowLayer; .*static_cache\(max_cache_len\)"):
        q(torch.arange(3, 9)[None], past_key_values=cache)
    lengths = []
    for new_tokens in (50, 12):
        settings = {**GREEDY, "max_new_tokens": new_tokens, "return_dict_in_generate": True}
        out = q.generate(torch.arange(3, 9)[None], cache_implementation="static", **settings).past_key_values
        assert {type(layer) for layer in out.layers} == {StaticLayer}
        lengths += [layer.keys.shape[2] for layer in out.layers]
    assert set(lengths) == {6 + 50 - 1}  # the length that a step may have been compiled for


def test_offloading_is_refused(llama):
    with pytest.raises(CallError, match="'offloaded_static'; of the static ones only 'static' is served"):
        llama.generate(torch.arange(3, 9)[None], cache_implementation="offloaded_static", **GREEDY)


def test_nothing_is_stored_twice(q):
    first, second = q.graph_module, q.graphs["static_cache"].graph_module
    assert {id(tensor) for tensor in second.buffers()} == {id(tensor) for tensor in first.buffers()}
    assert {id(tensor) for tensor in second.parameters()} == {id(tensor) for tensor in first.parameters()}
    addresses = [tensor.untyped_storage().data_ptr() for tensor in (*q.parameters(), *q.buffers()) if tensor.numel()]
    assert len(set(addresses)) == len(addresses)
    assert {id(m) for m in second.modules() if isinstance(m, PackedWeight)} == {
        id(m) for m in first.modules() if isinstance(m, PackedWeight)
    }


SETTINGS = {
    "w4a16": {"mode": "w4a16"},
    "static scales": {"activation_scale": "static"},
    "the head too": {"exclude": ()},
    "layers that differ": {"overrides": {"*.down_proj": {"format": "16x32"}, "*.o_proj": {"mode": "w4a16"}}},
}


@torch.no_grad()
@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("settings", SETTINGS)
def test_both_graphs_have_the_same_settings(settings):
    ids, mask = batch(3)
    q = lobcq_fx.quantize(causal_lm("llama-tied"), [{"input_ids": ids}], LobcqConfig(**SETTINGS[settings]))
    expected = pieces(q, transformers.DynamicCache(), ids, mask)
    assert_logits_close(pieces(q, q.static_cache(12), ids, mask), expected, mask)
    read = [
        {str(node.target) for node in graph.find_nodes(op="get_attr")}
        for graph in (q.stored_graph, q.graphs["static_cache"].stored)
    ]
    assert read[0] == read[1]


def refuse(*_, **__):
    raise ValueError("this cache cannot be written to")


def differ(plan, graph_module, paired=QuantizationPlan.pair):
    if graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.index_copy_.default):
        raise TraceError("it has 14 matmuls, the graph that it follows 15")
    return paired(plan, graph_module)


@torch.no_grad()
@pytest.mark.parametrize(
    ("target", "name", "replacement", "reason"),
    [
        (InPlaceCache, "update", refuse, "ValueError: this cache cannot be written to. Remedy:"),
        (QuantizationPlan, "pair", differ, "it has 14 matmuls"),
    ],
)
def test_a_model_without_such_a_graph_is_quantized_all_the_same(
    request, monkeypatch, caplog, tmp_path, target, name, replacement, reason
):
    if target is QuantizationPlan:  # the traces are those of other tests
        request.getfixturevalue("traced_once")
    monkeypatch.setattr(target, name, replacement)
    q = lobcq_fx.quantize(causal_lm("llama"))
    assert "static" in caplog.text
    ids, _ = batch(2)
    reference = quantized_causal_lm("llama")[1]
    assert torch.equal(q(ids).logits, reference(ids).logits)
    assert set(q.state_dict()) == set(reference.state_dict())
    q.save_pretrained(tmp_path / "q")
    for one in (q, lobcq_fx.load(tmp_path / "q")):
        with pytest.raises(CallError, match=f"no graph for static caches: .*{reason}.* Remedy: pass a DynamicCache"):
            one.generate(ids, cache_implementation="static", **GREEDY)
        assert one.generate(ids, **GREEDY).shape == (2, LENGTH + 12)


@pytest.mark.usefixtures("traced_once")
def test_it_can_be_left_out():
    q = lobcq_fx.quantize(causal_lm("llama"), static_cache=False)
    assert list(q.graphs) == ["main"]
    with pytest.raises(CallError, match=r"quantize\(\) was called with static_cache=False\. Remedy"):
        q(torch.arange(3, 9)[None], past_key_values=q.static_cache(9))


@torch.no_grad()
def test_a_call_that_fails_on_its_labels_counts_nothing():
    _, q = quantized_causal_lm("llama")
    cache = q.static_cache(8)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        q(ROW, past_key_values=cache, labels=ROW[:, :3])
    assert int(cache.get_seq_length()) == 0
