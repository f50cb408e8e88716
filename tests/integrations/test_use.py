"""What Hugging Face's own tools do with a model as modules: pipelines, generation, caches, torch.compile."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend

import lobcq_fx
from lobcq_fx.frontends.float_causal_lm import as_named_by
from tests.families import fake_quantized
from tests.integrations.models import GREEDY, IDS, MASK, causal_lm, opened, results, saved

STATIC = {"cache_implementation": "static", "disable_compile": True}
WAYS = {
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
    "static cache": STATIC,
    "static cache, beams": {**STATIC, "num_beams": 2},
    "no cache": {"use_cache": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(causal_lm(), tmp_path_factory.mktemp("folder") / "q")


@pytest.fixture(scope="module")
def model(folder):
    return opened(folder)


def generated(model, **settings):
    torch.manual_seed(5)
    return model.generate(IDS, **{**GREEDY, **settings})


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_fake_quantized_model(model, way):
    float_model = causal_lm()
    layers = [name for name, module in model.named_modules() if type(module).__name__ == "LobcqLinear"]
    with fake_quantized(float_model, layers, exact=True):
        expected = generated(float_model, **WAYS[way])
    assert torch.equal(generated(model, **WAYS[way]), expected)


def test_a_static_cache_of_the_caller(model):
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    call = {"input_ids": IDS, "attention_mask": MASK, "past_key_values": cache}
    with torch.no_grad():
        output = model(**as_named_by(model, call))
    assert cache.get_seq_length() == IDS.shape[1]
    torch.testing.assert_close(output.logits[MASK.bool()], results(model))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
def test_a_forward_is_compiled_whole(folder, tmp_path, mode):
    config = lobcq_fx.LobcqQuantizationConfig(lobcq_fx.LobcqConfig(mode=mode))
    causal_lm().save_pretrained(tmp_path)
    model = opened(tmp_path, quantization_config=config)
    expected = results(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    actual = compiled(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]
    assert counter.frame_count == 1
    linears = sum(
        node.target is not None and "linear_prepacked" in str(node.target)
        for g in counter.graphs
        for node in g.graph.nodes
    )
    assert linears == 14
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_pipeline_opens_a_folder_and_writes(tmp_path):
    source = lobcq_fx.default_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    float_model = transformers.AutoModelForCausalLM.from_pretrained(source)
    q = lobcq_fx.quantize(float_model, static_cache=False)
    q.save_pretrained(tmp_path / "q", tokenizer)
    write = transformers.pipeline("text-generation", model=str(tmp_path / "q"))
    assert type(write.model) is type(float_model)
    prompt, settings = "def __init__(self, ", {"max_new_tokens": 12, "do_sample": False}
    (written,) = write(prompt, **settings)
    ids = q.generate(**tokenizer(prompt, return_tensors="pt"), **settings)[0]
    assert written["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_call_needs_no_no_grad_and_activations_get_gradients(folder):
    model = opened(folder)
    assert not model(input_ids=IDS, attention_mask=MASK).logits.requires_grad
    embeddings = model.get_input_embeddings().requires_grad_(True)
    model(input_ids=IDS, attention_mask=MASK).logits.square().mean().backward()
    assert embeddings.weight.grad.isfinite().all()
    assert embeddings.weight.grad.any()
