"""`generate()` as users call it. `make transformers` runs this file with the oldest and the newest supported."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional
from transformers.generation.streamers import BaseStreamer

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.output_types import CACHE_NAME
from tests.families import VOCABULARY, fake_quantized, quantized_causal_lm, quantized_layers

IDS = torch.tensor([[7, 3, 11, 3, 11, 40, 5, 9], [0, 0, 8, 52, 8, 52, 8, 17]])
MASK = (IDS != 0).long()
SETTINGS = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
STATIC = {"cache_implementation": "static", "disable_compile": True}

WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": STATIC,
    "static cache, beams": {**STATIC, "num_beams": 3},
    "static cache, prompt in pieces": {**STATIC, "prefill_chunk_size": 3},
    "prompt in pieces": {"prefill_chunk_size": 3},
    "no cache": {"use_cache": False},
    "repetition penalty": {"repetition_penalty": 1.3},
}


@pytest.fixture(params=["llama", "mistral"])
def pair(request, traced_once):
    return quantized_causal_lm(request.param)


@pytest.fixture
def llama(traced_once):
    return quantized_causal_lm("llama")


def generated(model, ids=IDS, **settings):
    torch.manual_seed(5)
    return model.generate(ids, **{**SETTINGS, **settings})


def expected_of(model, q, ids=IDS, **settings):
    """What the float model generates on decoded weights and activations."""
    with fake_quantized(model, quantized_layers(q), exact=True):
        return generated(model, ids, **settings)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_fake_quantized_model(pair, way):
    model, q = pair
    assert torch.equal(generated(q, **WAYS[way]), expected_of(model, q, **WAYS[way]))


@pytest.mark.parametrize("helper", ["prompt_lookup", "assistant"])
def test_speculation_changes_no_token(llama, helper):
    model, q = llama
    settings = {"prompt_lookup_num_tokens": 2} if helper == "prompt_lookup" else {"assistant_model": model}
    one = {"ids": IDS[:1], "attention_mask": MASK[:1]}
    assert torch.equal(generated(q, **one, **settings), expected_of(model, q, **one))


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_gets_every_token(llama):
    _, q = llama
    streamer = Recorder()
    out = generated(q, ids=IDS[:1], attention_mask=MASK[:1], streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == out[0].tolist()


def test_scores_and_cache_come_along_when_asked_for(llama):
    _, q = llama
    out = generated(q, return_dict_in_generate=True, output_logits=True)
    assert getattr(out, CACHE_NAME).get_seq_length() == IDS.shape[1] + 7
    assert torch.equal(torch.stack(out.logits, dim=1).argmax(-1), out.sequences[:, IDS.shape[1] :])


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_goes_by_its_old_and_by_its_new_name(llama, name):
    _, q = llama
    for cache in (transformers.DynamicCache(), q.static_cache(IDS.shape[1])):
        parts = [q(part, **{name: cache}).logits for part in IDS.split((5, 3), dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), q(IDS).logits)
        assert cache.get_seq_length() == IDS.shape[1]


def test_two_caches_are_refused(llama):
    caches = {"past_key_values": transformers.DynamicCache(), "cache": transformers.DynamicCache()}
    with pytest.raises(CallError, match="two names of the same argument"):
        llama[1](IDS, **caches)


@torch.no_grad()
def test_settings_of_the_loss_are_the_float_model_s(llama):
    _, q = llama
    plain = q(IDS, labels=IDS)
    logits, labels = plain.logits[:, :-1].reshape(-1, VOCABULARY), IDS[:, 1:].flatten()
    torch.testing.assert_close(plain.loss, functional.cross_entropy(logits, labels))
    total = functional.cross_entropy(logits, labels, reduction="sum")
    for count in (5, torch.tensor(5)):
        torch.testing.assert_close(q(IDS, labels=IDS, num_items_in_batch=count).loss, total / 5)
    torch.testing.assert_close(
        q(IDS, labels=IDS, ignore_index=0).loss, functional.cross_entropy(logits, labels, ignore_index=0)
    )
    torch.testing.assert_close(
        q(IDS, labels=IDS, shift_labels=IDS).loss,
        functional.cross_entropy(plain.logits.flatten(0, 1), IDS.flatten()),
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "argument",
    [
        {"tokenizer": object()},
        {"cache_position": torch.arange(8)},
        {"is_causal": True},
        {"output_attentions": False},
        {"output_hidden_states": None},
        {"inputs_embeds": None},
        {"return_dict": True},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_arguments_without_effect_on_the_float_model_have_none(llama, argument):
    model, q = llama
    assert torch.equal(model(IDS, **argument).logits, model(IDS).logits)
    assert torch.equal(q(IDS, **argument).logits, q(IDS).logits)


@pytest.mark.parametrize(
    "argument",
    [
        {"is_causal": False},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"token_type_ids": torch.zeros_like(IDS)},
        {"inputs_embeds": torch.zeros(2, 8, 72)},
        {"cu_seq_lens_q": torch.tensor([0, 3, 8])},
        {"unheard_of": 0},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_arguments_that_would_change_the_result_are_refused_by_name(llama, argument):
    with pytest.raises(CallError, match=f"'{next(iter(argument))}' is not supported"):
        llama[1](IDS, **argument)


def test_continuous_batching_is_refused_before_it_starts():
    _, q = quantized_causal_lm("llama")
    with pytest.raises(CallError, match=r"pages, which a traced graph does not read\. Remedy: generate\(\)"):
        q.generate_batch([[5, 6, 7]], generation_config=transformers.GenerationConfig(max_new_tokens=2))
