"""torch.compile(fullgraph=True): no graph break, and the eager result."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

import lobcq_fx
from tests.families import VOCABULARY, causal_lm


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids(batch, length):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
@pytest.mark.parametrize(("mode", "backend"), [("w4a4", "inductor"), ("w4a16", "aot_eager")])
def test_a_causal_lm_compiles_whole(mode, backend):
    q = lobcq_fx.quantize(causal_lm("llama"), config=lobcq_fx.LobcqConfig(mode=mode))
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend=backend)
    tokens = ids(2, 9)
    prefill = compiled(input_ids=tokens[:, :6], attention_mask=torch.ones(2, 6, dtype=torch.long))
    step = compiled(
        input_ids=tokens[:, 6:],
        attention_mask=torch.ones(2, 9, dtype=torch.long),
        past_key_values=prefill.past_key_values,
    )
    expected = q(tokens).logits
    actual = torch.cat((prefill.logits, step.logits), dim=1)
    assert (actual - expected).norm() < 1e-3 * expected.norm()


@torch.no_grad()
def test_the_flat_graph_of_a_causal_lm_compiles_once_for_all_lengths():
    q = lobcq_fx.quantize(causal_lm("llama"))
    counter = CompileCounter()
    compiled = torch.compile(q.graph_module, fullgraph=True, dynamic=True, backend=counter)
    cache = None
    for length in (5, 4, 3, 2):
        tokens = ids(2, length)
        past = 0 if cache is None else cache.get_seq_length()
        call = {"attention_mask": torch.ones(2, past + length, dtype=torch.long), "past_key_values": cache}
        flat = q.calling.flatten((tokens,), call)
        expected = q.graph_module(*flat)
        for actual, wanted in zip(compiled(*flat), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        cache = q.calling.unflatten(expected, (tokens,), call).past_key_values
    assert counter.frame_count <= 2  # an empty cache and a filled one


@torch.no_grad()
def test_every_step_after_a_prompt_runs_one_graph():
    q = lobcq_fx.quantize(causal_lm("llama"))
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(q, fullgraph=True, dynamic=True)
    cache = transformers.DynamicCache()
    for tokens in (ids(1, 6), ids(1, 1), ids(1, 1), ids(1, 1)):
        compiled(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
        assert all(state.is_contiguous() for layer in cache.layers for state in (layer.keys, layer.values))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the prompt's and the steps'


@torch.no_grad()
def test_an_encoder_compiles_whole():
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    q = lobcq_fx.quantize(transformers.BertModel(config).eval())
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager")
    call = {"input_ids": ids(3, 7), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    actual, expected = compiled(**call), q(**call)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
