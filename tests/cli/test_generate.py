from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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


def test_a_prompt_may_come_from_standard_input(lobcq: Run, llama: Path) -> None:
    arguments = ("generate", llama, "--max-new-tokens", 6)
    expected = lobcq.json(*arguments, "-p", "The cat\nsees")
    assert json.loads(lobcq(*arguments, "--json", stdin="The cat\nsees\n").stdout)["tokens"] == expected["tokens"]
    assert expected["prompt"] == "The cat\nsees"
    assert "prompt is empty" in lobcq.refused(*arguments, code=2)


def test_it_ends_where_a_text_has_come(lobcq: Run) -> None:
    arguments = ("generate", "default", "-p", "def __init__(self, ", "--max-new-tokens", 24)
    whole = lobcq.json(*arguments)
    stopped = lobcq.json(*arguments, "--stop", whole["text"][10:12])
    assert len(stopped["tokens"]) < len(whole["tokens"])
    assert whole["text"].startswith(stopped["text"])
    assert whole["text"][10:12] in stopped["text"]


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} sees {{ m.content }} . {% endfor %}{% if add_generation_prompt %}A {% endif %}"
)


@pytest.fixture
def instructed(llama: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer has a chat template."""
    folder = tmp_path / "instructed"
    shutil.copytree(llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_with_a_chat_template_answers(lobcq: Run, instructed: Path) -> None:
    arguments = ("generate", instructed, "-p", "the ball", "--max-new-tokens", 6)
    model, tokenizer = LlamaForCausalLM.from_pretrained(instructed).eval(), AutoTokenizer.from_pretrained(instructed)

    def expected(text: str) -> list[int]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens: list[int] = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
        return tokens

    assert lobcq.json(*arguments)["tokens"] == expected("user sees the ball . A ")
    assert lobcq.json(*arguments, "--system", "a key")["tokens"] == expected(
        "system sees a key . user sees the ball . A "
    )
    assert lobcq.json(*arguments, "--no-chat")["tokens"] == expected("the ball")
    assert lobcq(*arguments).stdout.strip() == lobcq.json(*arguments)["text"].strip()
    assert "in a chat alone" in lobcq.refused(*arguments, "--no-chat", "--system", "a key", code=2)


def test_no_chat_template(lobcq: Run, llama: Path) -> None:
    assert "has no chat template" in lobcq.refused("generate", llama, "-p", "a", "--chat", code=3)
    assert "has no chat template" in lobcq.refused("chat", llama, code=3)


@pytest.mark.parametrize("kv_cache", [None, "1x16"])
def test_a_chat_is_one_conversation(lobcq: Run, instructed: Path, kv_cache: str | None) -> None:
    """Each answer is what the model makes of the whole conversation so far, computed anew."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(instructed).eval(), AutoTokenizer.from_pretrained(instructed)
    messages, answers = [], []
    for prompt in ("the ball", "a key", "the stone"):
        messages = [] if prompt == "the stone" else messages
        messages.append({"role": "user", "content": prompt})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        cache = {} if kv_cache is None else {CACHE_NAME: lobcq_fx.LobcqCache(kv_cache)}
        output = model.generate(ids, max_new_tokens=5, do_sample=False, **cache)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(output, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    talk = "the ball\na key\n/new\n\nthe stone\n/exit\nnever read\n"
    options = () if kv_cache is None else ("--kv-cache", kv_cache)
    shown = lobcq("chat", instructed, "--max-new-tokens", 5, *options, stdin=talk)
    assert "".join(shown.stdout.split()) == "".join("".join(answers).split())
    assert shown.stderr.count("tokens/s") == 3


def test_a_chat_forgets_its_oldest_turns_before_it_grows_too_long(lobcq: Run, instructed: Path) -> None:
    shown = lobcq(
        "chat", instructed, "--max-new-tokens", 20, stdin="the ball\na key\nthe stone\n" + "a key " * 60 + "\n"
    )
    assert shown.stderr.count("tokens/s") == 3
    assert "than the 64 that the model takes" in " ".join(shown.stderr.split())


def test_what_cannot_generate(lobcq: Run, llama: Path, bert: Path, edited: Callable[..., Path]) -> None:
    assert "cannot generate" in lobcq.refused("generate", bert, "-p", "a", code=3)
    assert "prompt is empty" in lobcq.refused("generate", llama, "-p", "", code=2)
    folder = edited(llama, without=("tokenizer*",))
    assert "has no tokenizer" in lobcq.refused("generate", folder, "-p", "a", code=3)
