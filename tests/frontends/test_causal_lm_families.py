"""Every family of causal language models: one traced graph serves prefill, continuation and decode."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from tests.families import EVERY_CAUSAL_LM, VOCABULARY, fake_quantized, quantized_causal_lm, quantized_layers

LENGTH = 11


@pytest.fixture(params=EVERY_CAUSAL_LM)
def pair(request, traced_once):
    return quantized_causal_lm(request.param)


def batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (size, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if size > 1:
        mask[0, :3] = 0  # padded on the left
        ids[0, :3] = 0
    return ids, mask


def assert_logits_close(actual, expected, mask):
    """Equal up to rounding, except where a rounding difference of 1e-7 moved an activation across a code boundary.

    Such a flip changes a logit by about a thousandth of the logits' spread; a wrong scale, mask or position changes
    all of them by more than the spread itself.
    """
    difference = (actual - expected)[mask.bool()]
    spread = expected[mask.bool()].std()
    assert difference.abs().median() < 1e-5 * spread
    assert difference.abs().max() < 0.1 * spread


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3])
def test_prefill_continuation_and_decode_agree_with_the_fake_quantized_model(pair, size):
    model, q = pair
    ids, mask = batch(size)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    keywords = {"position_ids": positions} if "position_ids" in q.calling.inputs else {}
    with fake_quantized(model, quantized_layers(q)):
        expected = model(input_ids=ids, attention_mask=mask, **keywords).logits
    spread = expected.std()
    float_logits = model(input_ids=ids, attention_mask=mask, **keywords).logits
    assert (float_logits - expected).abs().max() > 1e-3 * spread  # quantization is visible at all

    pieces, cache = [], None
    for start, stop in ((0, 6), (6, 9), (9, 10), (10, 11)):
        part = {
            name: value[:, start:stop]
            for name, value in {"input_ids": ids, **({"position_ids": positions} if keywords else {})}.items()
        }
        out = q(**part, attention_mask=mask[:, :stop], past_key_values=cache)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert cache.get_seq_length() == LENGTH
    assert_logits_close(torch.cat(pieces, dim=1), expected, mask)


@torch.no_grad()
def test_greedy_tokens_are_those_of_the_fake_quantized_model(pair):
    model, q = pair
    ids, mask = batch(3, seed=1)
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    with fake_quantized(model, quantized_layers(q), exact=True):
        expected = model.generate(ids, **settings)
    assert torch.equal(q.generate(ids, **settings), expected)


def test_output_type_and_defaults_are_the_model_s(pair):
    model, q = pair
    ids, mask = batch(3)
    with torch.no_grad():
        expected, actual = model(ids, attention_mask=mask), q(ids, attention_mask=mask)
        assert type(actual) is type(expected)
        assert actual.logits.shape == expected.logits.shape
        assert q(ids, logits_to_keep=2).logits.shape == (3, 2, VOCABULARY)
        labelled = q(ids, attention_mask=mask, labels=ids)
    assert q(ids, use_cache=False).past_key_values is None
    torch.testing.assert_close(
        labelled.loss, torch.nn.functional.cross_entropy(actual.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )


@pytest.mark.parametrize(("field", "value"), [("cache_dtype", "load"), ("output_type", "annotations")])
def test_a_damaged_calling_convention_is_refused(pair, field, value):
    values = pair[1].calling.to_dict()
    assert CausalLMCall.from_dict(values) == pair[1].calling
    with pytest.raises(ValueError, match=field):
        CausalLMCall.from_dict({**values, field: value})
