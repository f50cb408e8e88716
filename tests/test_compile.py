"""torch.compile(fullgraph=True): no graph break, and the eager result."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import lobcq_fx
from tests.families import VOCABULARY, WITH_STATIC_CACHE, causal_lm, quantized_causal_lm
from tests.sweeps import sweep

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@cache
def quantized_llama():
    """Of one layer, with both graphs; no test changes it."""
    return lobcq_fx.quantize(causal_lm("llama", num_hidden_layers=1), static_cache=True)


def ids(batch, length):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
def test_a_causal_lm_compiles_whole(mode):
    q = lobcq_fx.quantize(
        causal_lm("llama", num_hidden_layers=1), config=lobcq_fx.LobcqConfig(mode=mode), static_cache=False
    )
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend="aot_eager")
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
    q = quantized_llama()
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
    """By inductor, which computes what eager torch does."""
    q = quantized_llama()
    compiled = torch.compile(q, fullgraph=True, dynamic=True)
    cache, own = transformers.DynamicCache(), transformers.DynamicCache()
    for tokens in (ids(1, 6), ids(1, 1), ids(1, 1), ids(1, 1)):
        actual = compiled(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits
        expected = q(input_ids=tokens, past_key_values=own, logits_to_keep=1).logits
        assert (actual - expected).norm() < 1e-3 * expected.norm()
        assert all(state.is_contiguous() for layer in cache.layers for state in (layer.keys, layer.values))
    assert counters["stats"]["unique_graphs"] == 2  # the prompt's and the steps'


def greedy(forward, prompt, steps, cache):
    """Tokens, the prompt's first sequence padded on the left; the mask grows, or is the whole static cache's."""
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    tokens, length = prompt, cache.get_max_length() if cache.layers else None
    for _ in range(steps):
        call_mask = mask if length is None else torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
        # A clone, as in generate(): strides are guarded too, and a view's grow with the mask.
        positions = (
            (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :].clone(memory_format=torch.contiguous_format)
        )
        logits = forward(
            input_ids=tokens, attention_mask=call_mask, position_ids=positions, past_key_values=cache
        ).logits
        tokens = logits[:, -1:].argmax(-1)
        mask = torch.cat((mask, torch.ones_like(tokens)), dim=1)
        yield tokens


PROMPTS = (5, 9, 7)
STEPS = 4


@torch.no_grad()
# The others' are as theirs.
@pytest.mark.parametrize(
    "family", sweep(["llama", "gemma3", "gpt2", "bloom", "opt", "phi3"], ["llama", "gemma3", "bloom"])
)
def test_there_is_one_graph_for_prompts_and_one_for_steps(family):
    q = quantized_causal_lm(family)[1]
    counter = CompileCounter()
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for length in PROMPTS:
        expected = list(greedy(q, ids(2, length), STEPS, transformers.DynamicCache()))
        for actual, wanted in zip(
            greedy(compiled, ids(2, length), STEPS, transformers.DynamicCache()), expected, strict=True
        ):
            assert torch.equal(actual, wanted)
            counts.append(counter.frame_count)
    assert counts == [1] + [2] * (len(PROMPTS) * STEPS - 1)


class Inspected:
    """A backend that runs graphs as they are after AOTAutograd, and keeps what a CUDA graph would have to hold."""

    def __init__(self):
        self.graphs = []
        self.copied = []
        self.backend = aot_autograd(fw_compiler=self.compile)

    def compile(self, graph_module, inputs):
        metadata = torch._guards.TracingContext.get().fw_metadata
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        self.graphs.append(graph_module.graph)
        self.copied.append(
            [p.meta["val"] for i, p in enumerate(placeholders) if i not in metadata.static_input_indices]
        )
        for place, changed in enumerate(metadata.input_info):
            assert not changed.mutates_data or place in metadata.static_input_indices
        return graph_module


@torch.no_grad()
@pytest.mark.parametrize("family", sweep(WITH_STATIC_CACHE, ["llama", "gemma3", "gpt2", "bloom"]))
def test_every_step_on_a_static_cache_is_one_graph_of_fixed_sizes(family):
    q = quantized_causal_lm(family)[1]
    inspected = Inspected()
    compiled = torch.compile(q, fullgraph=True, backend=inspected.backend)
    prompt, length = ids(2, 6), 16
    expected = list(greedy(q, prompt, 6, q.static_cache(length, batch_size=2)))
    assert all(map(torch.equal, expected, greedy(q, prompt, 6, transformers.DynamicCache())))

    def prompt_eager_then_compiled(**call):
        return (q if call["input_ids"].shape[1] > 1 else compiled)(**call)

    for _ in range(2):  # a second cache of that size needs no other graph
        actual = greedy(prompt_eager_then_compiled, prompt, 6, q.static_cache(length, batch_size=2))
        assert all(map(torch.equal, expected, actual))
    (graph,), (copied,) = inspected.graphs, inspected.copied
    # Weights, the cache and its counters stay where they are; what a replay copies is tokens, mask and positions.
    assert sorted(list(value.shape) for value in copied) in ([[2, 1], [2, 1], [2, length]], [[2, 1], [2, length]])
    targets = {str(node.target) for node in graph.nodes}
    assert not any("local_scalar" in target or "nonzero" in target or "sym_size" in target for target in targets)
    assert all(isinstance(size, int) for value in values_of(graph) for size in value.shape)
    assert all(value.device.type == "cpu" for value in values_of(graph))


def values_of(graph):
    values = [value for node in graph.nodes for value in torch.utils._pytree.tree_leaves(node.meta.get("val"))]
    assert not any(isinstance(value, torch.SymInt) for value in values)
    return [value for value in values if isinstance(value, torch.Tensor)]


@torch.no_grad()
def test_inductor_runs_steps_on_a_static_cache_without_another_graph():
    q = quantized_llama()
    expected = list(greedy(q, ids(1, 6), 6, q.static_cache(16)))
    steps = torch.compile(q, fullgraph=True)
    actual = greedy(
        lambda **call: (q if call["input_ids"].shape[1] > 1 else steps)(**call), ids(1, 6), 6, q.static_cache(16)
    )
    assert all(map(torch.equal, expected, actual))
    assert counters["stats"]["unique_graphs"] == 1


def test_generate_compiles_the_step_once():
    q = quantized_llama()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    compile_config = transformers.CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    compile_config._compile_all_devices = True  # off GPUs generate() compiles nothing unless told
    for length in (9, 6):
        expected = q.generate(ids(2, length), **settings)
        settings_compiled = {**settings, "cache_implementation": "static", "compile_config": compile_config}
        assert torch.equal(q.generate(ids(2, length), **settings_compiled), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


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
