from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import lobcq_fx
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


def test_what_cannot_generate(lobcq: Run, llama: Path, bert: Path, edited: Callable[..., Path]) -> None:
    assert "cannot generate" in lobcq.refused("generate", bert, "-p", "a", code=3)
    assert "prompt is empty" in lobcq.refused("generate", llama, "-p", "", code=2)
    folder = edited(llama, without=("tokenizer*",))
    assert "has no tokenizer" in lobcq.refused("generate", folder, "-p", "a", code=3)
