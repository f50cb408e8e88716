"""Language models that keep states of a fixed size, beside keys and values or instead of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import lobcq_fx
from lobcq_fx.cli.conversation import Conversation
from lobcq_fx.errors import CallError, ConfigError, ExportError
from lobcq_fx.frontends.output_types import CACHE_NAME, CACHE_PARAMS
from lobcq_fx.frontends.recurrent_call import RecurrentCall
from tests.families import VOCABULARY, fake_quantized, quantized_layers
from tests.frontends.test_causal_lm_families import assert_logits_close
from tests.more_families import RECURRENT

LENGTH = 80
"""More than a chunk of 64 tokens, with which the gated delta rule scans."""

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

OPERATORS = {
    "lfm2": None,
    "mamba": torch.ops.lobcq.selective_scan.default,
    "qwen3_5_text": torch.ops.lobcq.gated_delta_rule.default,
    "falcon_h1": torch.ops.lobcq.chunk_scan.default,
}


@cache
def quantized(family):
    model = RECURRENT[family].model()
    return model, lobcq_fx.quantize(model)


@pytest.fixture(scope="module", params=list(RECURRENT))
def pair(request):
    return quantized(request.param)


def batch(length=LENGTH, seed=0):
    """Three sequences, one padded on the left by more than a convolution sees, one by less."""
    ids = torch.randint(3, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = mask[1, :2] = 0
    return ids * mask, mask


def name_of(q):
    """What the original calls its cache."""
    return CACHE_NAME if q.calling.attends else CACHE_PARAMS


def call_of(q, ids, mask, start, stop):
    """A call of some tokens as the original takes it: without attention it knows of the mask of those alone."""
    call = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, (0 if q.calling.attends else start) : stop]}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
    return call | ({"position_ids": positions} if "position_ids" in q.calling.inputs else {})


def logits_of(called, q, ids, mask, sizes, cache=None):
    """By calls of so many tokens, on one cache."""
    cache = DynamicCache(config=q.config) if cache is None else cache
    pieces, start = [], 0
    for size in sizes:
        call = call_of(q, ids, mask, start, start + size)
        out = called(**call, use_cache=True, **{name_of(q): cache})
        assert out[name_of(q)] is cache
        pieces.append(out.logits)
        start += size
    return torch.cat(pieces, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(70, 3, 1, 1, 5), (64, 16)], ids=str)
def test_prompts_continuations_and_steps_agree_with_the_fake_quantized_model(pair, sizes):
    model, q = pair
    ids, mask = batch()
    with fake_quantized(model, quantized_layers(q)):
        expected = logits_of(model, q, ids, mask, (LENGTH,))
    assert_logits_close(logits_of(q, q, ids, mask, sizes), expected, mask)


@torch.no_grad()
def test_a_prompt_of_one_token(pair):
    model, q = pair
    ids, mask = torch.tensor([[7, 8, 9]]), torch.ones(1, 3, dtype=torch.long)
    with fake_quantized(model, quantized_layers(q)):
        expected = logits_of(model, q, ids, mask, (1, 1, 1))
    assert_logits_close(logits_of(q, q, ids, mask, (1, 1, 1)), expected, mask)


@torch.no_grad()
def test_calls_and_caches_go_back_and_forth_between_both_models(pair):
    model, q = pair
    ids, mask = batch(20)
    with fake_quantized(model, quantized_layers(q)):
        expected = logits_of(model, q, ids, mask, (20,))
        cache, pieces = DynamicCache(config=q.config), []
        for start, stop, called in ((0, 17, model), (17, 18, q), (18, 19, model), (19, 20, q)):
            call = call_of(q, ids, mask, start, stop)
            pieces.append(called(**call, use_cache=True, **{name_of(q): cache}).logits)
    assert_logits_close(torch.cat(pieces, dim=1), expected, mask)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "prompt in pieces": {"prefill_chunk_size": 5},
}


def generated(model, way=None, length=13, **settings):
    ids, mask = batch(length, seed=2)
    torch.manual_seed(5)
    return model.generate(ids, attention_mask=mask, **{**GREEDY, **WAYS.get(way, {}), **settings})


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_fake_quantized_model(pair, way):
    model, q = pair
    if way == "prompt in pieces" and not q.calling.attends:
        way = "greedy"  # the original has no prompt in pieces: it asks what states do not know
    with fake_quantized(model, quantized_layers(q), exact=True):
        expected = generated(model, way)
    assert torch.equal(generated(q, way), expected)


@pytest.mark.parametrize("family", RECURRENT)
def test_generation_goes_on_from_a_cache(family):
    _, q = quantized(family)
    ids = batch(12)[0][2:]
    whole = q.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    cache = DynamicCache(config=q.config)
    first = q.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, "max_new_tokens": 3, name_of(q): cache})
    # A model without attention is given the tokens that its states have not seen, others all of them.
    more = first if q.calling.attends else first[:, -1:]
    settings = {**GREEDY, "max_new_tokens": 3, name_of(q): cache}
    both = q.generate(more, attention_mask=torch.ones_like(more), **settings)
    assert torch.equal(both[:, -3:], whole[:, -3:])


def test_the_graph_scans_by_an_operator_and_is_the_only_one(pair):
    _, q = pair
    operator = OPERATORS[q.config.model_type]
    called = {node.target for node in q.stored_graph.nodes if str(node.target).startswith("lobcq")}
    assert operator is None or operator in called
    assert list(q.graphs) == ["main"]
    assert "states of a fixed size" in q.refused_graphs["static_cache"]


def test_a_saved_model_generates_the_same_tokens(pair, tmp_path):
    _, q = pair
    q.save_pretrained(tmp_path / "q")
    loaded = lobcq_fx.load(tmp_path / "q")
    assert loaded.calling == q.calling
    ids, mask = batch()
    with torch.no_grad():
        parts = [logits_of(one, q, ids, mask, (70, 9, 1)) for one in (q, loaded)]
    assert torch.equal(*parts)
    assert torch.equal(generated(loaded, "beams"), generated(q, "beams"))
    with pytest.raises(ValueError, match="stateful"):
        loaded.generate(ids[2:], prompt_lookup_num_tokens=2, **GREEDY)


@pytest.mark.parametrize("field", ["conv", "recurrent", "attends"])
def test_a_damaged_calling_convention_is_refused(field):
    values = quantized("mamba")[1].calling.to_dict()
    assert RecurrentCall.from_dict(values) == quantized("mamba")[1].calling
    damaged = {"conv": [], "recurrent": [{"shape": [4, -1], "dtype": "float32"}], "attends": True}
    layer = {**values["layers"][0], field: damaged[field]}
    with pytest.raises(ValueError, match=r"layer|state|attend"):
        RecurrentCall.from_dict({**values, "layers": [layer]})


def test_static_caches_are_refused_by_name(pair):
    _, q = pair
    ids, _ = batch(5)
    if q.calling.attends:  # of layers without attention a static cache is as any other
        with pytest.raises(CallError, match="no graph for static caches: the model keeps states of a fixed size"):
            q(ids, past_key_values=StaticCache(config=q.config, max_cache_len=20))
    with pytest.raises(CallError, match="'static', but the model keeps states of a fixed size"):
        generated(q, cache_implementation="static")
    with pytest.raises(CallError, match="states of a fixed size"):
        q.static_cache(20)


def test_quantized_caches_are_refused_by_name(pair):
    model, q = pair
    ids, _ = batch(5)
    with pytest.raises(CallError, match="LobcqCache, but the model keeps states of a fixed size"):
        q(ids, past_key_values=lobcq_fx.LobcqCache())
    started: list[tuple[object, ...]] = []
    with pytest.raises(ConfigError, match="kv_cache is '8x64', but the model keeps states of a fixed size"):
        lobcq_fx.quantize(
            model, config=lobcq_fx.LobcqConfig(kv_cache="8x64"), progress=lambda *step: started.append(step)
        )
    assert not started, "before anything is traced"


@torch.no_grad()
def test_what_cannot_be_taken_back_is_refused(pair):
    _, q = pair
    ids, mask = batch(6)
    cache = DynamicCache(config=q.config)
    logits_of(q, q, ids, mask, (3,), cache)
    cache.activate_past_recording()
    with pytest.raises(CallError, match="records its past so that it can be cropped"):
        q(ids[:, 3:4], past_key_values=cache)
    with pytest.raises(ValueError, match="stateful"):
        q.generate(ids[2:], prompt_lookup_num_tokens=2, **GREEDY)


@torch.no_grad()
def test_caches_of_another_batch_or_model_are_refused(pair):
    _, q = pair
    ids, mask = batch(6)
    cache = DynamicCache(config=q.config)
    logits_of(q, q, ids, mask, (3,), cache)
    with pytest.raises(CallError, match="the call needs a"):
        q(ids[:2, 3:4], attention_mask=mask[:2, :4], past_key_values=cache)
    cache.layers = cache.layers * 2
    with pytest.raises(CallError, match="layers, the model"):
        q(ids[:, 3:4], past_key_values=cache)
    if q.calling.attends:
        grown = DynamicCache()
        for layer in range(len(q.calling.layers)):
            grown.update(torch.ones(3, 2, 3, 16), torch.ones(3, 2, 3, 16), layer)
        with pytest.raises(CallError, match="holds a DynamicLayer where the model keeps"):
            q(ids[:, 3:4], past_key_values=grown)


def test_tokens_of_a_cache_that_cannot_count_them_are_asked_for():
    _, q = quantized("mamba")
    ids, mask = batch(6)
    cache = DynamicCache(config=q.config)
    with torch.no_grad():
        logits_of(q, q, ids, mask, (3,), cache)
    with pytest.raises(CallError, match="pass it as cache_params, and the new tokens alone"):
        q.generate(ids, **{CACHE_NAME: cache}, **GREEDY)


def test_onnx_and_modules_are_refused_by_name(pair, tmp_path):
    _, q = pair
    with pytest.raises(ExportError, match="states of a fixed size"):
        lobcq_fx.export_onnx(q, tmp_path / "onnx")
    if q.config.model_type == "mamba":
        q.save_pretrained(tmp_path / "q")
        with pytest.raises(lobcq_fx.LobcqError, match="which no module does"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "q")


@torch.no_grad()
def test_a_compiled_step_gives_the_same():
    _, q = quantized("mamba")
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend="aot_eager")
    ids, mask = batch(9)
    expected = logits_of(q, q, ids, mask, (8, 1))[:, 8:]
    cache = DynamicCache(config=q.config)
    logits_of(q, q, ids, mask, (8,), cache)
    actual = compiled(**call_of(q, ids, mask, 8, 9), **{name_of(q): cache}).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_states_keep_their_own_dtype():
    model = RECURRENT["mamba"].model().bfloat16()
    q = lobcq_fx.quantize(model)
    (layer,) = q.calling.layers
    assert [state.dtype for state in layer.fixed] == ["bfloat16", "float32"]
    ids, mask = batch(12)
    with fake_quantized(model, quantized_layers(q)):
        expected = logits_of(model, q, ids, mask, (12,))[mask.bool()]
    actual = logits_of(q, q, ids, mask, (6, 1, 5))[mask.bool()]
    assert (actual - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("states", ["conv_states", "recurrent_states"])
def test_a_lost_state_would_be_seen(pair, states):
    """The tests above are about states: without them results are others by far."""
    _, q = pair
    ids, mask = batch()
    whole = logits_of(q, q, ids, mask, (LENGTH,))
    cache = DynamicCache(config=q.config)
    logits_of(q, q, ids, mask, (70,), cache)
    (state,) = (getattr(layer, states)[0] for layer in cache.layers if hasattr(layer, states))
    if state is None:
        assert (q.config.model_type, states) == ("lfm2", "recurrent_states")
        return
    state.zero_()
    last = q(**call_of(q, ids, mask, 70, LENGTH), **{name_of(q): cache}).logits
    assert (last - whole[:, 70:])[1, 0].abs().median() > 1e-2 * whole.std()


def test_defaults_of_a_call_are_the_model_s():
    _, q = quantized("mamba")
    assert replace(q.calling) == q.calling
    ids, _ = batch(5)
    with torch.no_grad():
        assert q(ids, logits_to_keep=2).logits.shape == (3, 2, VOCABULARY)
        assert q(ids, use_cache=False).cache_params is None
        with pytest.raises(CallError, match="attention_mask has shape"):
            q(ids, attention_mask=torch.ones(3, 4, dtype=torch.long))


class Tokenizer:
    """Messages are what was said, after which something is asked; decoded, a message is made of its tokens."""

    def apply_chat_template(self, messages, **_):
        ids = [token for message in messages for token in (5, *map(int, message["content"].split()))]
        return {"input_ids": torch.tensor([[*ids, 6]])}

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def test_a_chat_reads_the_conversation_anew(pair):
    _, q = pair
    settings = {**GREEDY, "max_new_tokens": 3}
    chat, ids = Conversation(q, Tokenizer(), settings=settings), []
    for said in ([7, 8], [9], [10, 11]):
        ids = [*ids, 5, *said]
        expected = q.generate(torch.tensor([[*ids, 6]]), **settings)[0, -3:].tolist()
        assert chat.answer(" ".join(map(str, said))) == expected
        ids = [*ids, 5, *expected]
