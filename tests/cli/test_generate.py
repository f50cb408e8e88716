from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaForCausalLM

import lobcq_fx
from lobcq_fx.frontends.output_types import CACHE_NAME
from tests.cli.conftest import Run


def test_greedy_text_is_what_the_model_generates(lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = quantized_llama
    found = lobcq.json("generate", folder, "--prompt", "The cat sees", "--max-new-tokens", 12)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The cat sees", return_tensors="pt")["input_ids"]
    expected = lobcq_fx.load(folder).generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert found["tokens"] == expected.tolist()
    assert found["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert found["prompt_tokens"] == ids.shape[1]


def test_people_see_the_prompt_and_its_continuation(lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = quantized_llama
    arguments = ("generate", folder, "-p", "A dog", "--max-new-tokens", 8)
    result = lobcq(*arguments)
    assert result.stdout.strip() == ("A dog" + lobcq.json(*arguments)["text"]).strip()
    assert "tokens/s" in result.stderr


def test_sampling_depends_on_the_seed_alone(lobcq: Run, llama: Path) -> None:
    def tokens(seed: int) -> Any:
        arguments = ("--sample", "--temperature", 2.0, "--top-p", 0.95, "--seed", seed, "--max-new-tokens", 10)
        return lobcq.json("generate", llama, "-p", "The cat", *arguments)["tokens"]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_a_quantized_cache(lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer("The cat sees", return_tensors="pt")["input_ids"]
    settings, changed = {"max_new_tokens": 12, "do_sample": False}, []
    for folder, model in (
        (quantized_llama[0], lobcq_fx.load(quantized_llama[0])),
        (llama, LlamaForCausalLM.from_pretrained(llama).eval()),
    ):
        arguments = ("generate", folder, "-p", "The cat sees", "--max-new-tokens", 12)
        expected = model.generate(ids, **{CACHE_NAME: lobcq_fx.LobcqCache("1x16")}, **settings)[0, ids.shape[1] :]
        assert lobcq.json(*arguments, "--kv-cache", "1x16")["tokens"] == expected.tolist()
        changed.append(lobcq.json(*arguments)["tokens"] != expected.tolist())
    assert any(changed)
    cached = ("--kv-cache", "8x64", "--attention", "w4a8")
    found = lobcq.json("generate", quantized_llama[0], "-p", "The cat sees", "--max-new-tokens", 12, *cached)
    cache = lobcq_fx.LobcqCache("8x64", attention="w4a8")
    expected = lobcq_fx.load(quantized_llama[0]).generate(ids, **{CACHE_NAME: cache}, **settings)
    assert found["tokens"] == expected[0, ids.shape[1] :].tolist()
    refused = lobcq.refused("generate", llama, "-p", "a", *cached, "--json", code=3)
    assert "own attention multiplies floats" in refused
    assert "pass --kv-cache too" in lobcq.refused("generate", llama, "-p", "a", "--attention", "w4a8", code=2)
    assert "write '<codebooks>x" in lobcq.refused("generate", llama, "-p", "a", "--kv-cache", "4bit", code=2)
    assert "leave out --onnx" in lobcq.refused("generate", llama, "-p", "a", "--kv-cache", "8x64", "--onnx", code=2)


def test_what_cannot_generate(lobcq: Run, llama: Path, bert: Path, edited: Callable[..., Path]) -> None:
    assert "cannot generate" in lobcq.refused("generate", bert, "-p", "a", code=3)
    assert "prompt is empty" in lobcq.refused("generate", llama, "-p", "", code=2)
    folder = edited(llama, without=("tokenizer*",))
    assert "has no tokenizer" in lobcq.refused("generate", folder, "-p", "a", code=3)
