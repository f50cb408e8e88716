from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM

import lobcq_fx
from lobcq_fx.evaluation import (
    Question,
    SentencePair,
    WithLobcqCache,
    cosine_similarity,
    divergence,
    last_word,
    multiple_choice,
    perplexity,
    sentence_embeddings,
    sentences_of,
    sts,
)
from tests.cli.conftest import TEXT, Run


def test_a_text_against_the_float_model(
    lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], llama: Path, text_file: Path
) -> None:
    folder, _ = quantized_llama
    found = lobcq.json(
        "eval", folder, "--against", llama, "--text", text_file, "--window", 32, "--stride", 8, "--max-tokens", 200
    )
    ids = AutoTokenizer.from_pretrained(llama)(TEXT, add_special_tokens=False, verbose=False)["input_ids"][:200]
    q, model = lobcq_fx.load(folder), LlamaForCausalLM.from_pretrained(llama).eval()
    (result,) = found["results"]
    assert [(one["model"], one["quantized"]) for one in found["models"]] == [("llama-4bit", True), ("llama", False)]
    assert (result["kind"], result["source"]) == ("text", str(text_file))
    assert result["settings"] == {"window": 32, "stride": 8, "bos_token_id": None, "tokens": 199}
    for figures, one in zip(result["models"], (q, model), strict=True):
        expected = perplexity(one, ids, window=32, stride=8)
        assert figures["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    one, other = (figures["perplexity"] for figures in result["models"])
    pair = divergence(q, model, ids, window=32, stride=8)
    assert result["together"] == pytest.approx(
        {
            "perplexity_ratio": one / other,
            "kl_divergence": pair.kl_divergence,
            "top1_agreement": pair.top1_agreement,
        },
        rel=1e-5,
    )
    assert pair.kl_divergence > 0


def test_a_quantized_cache_of_the_first_model(lobcq: Run, llama: Path, bert: Path, text_file: Path) -> None:
    asked = ("--text", text_file, "--window", 32, "--stride", 8, "--max-tokens", 100)
    found = lobcq.json("eval", llama, "--against", llama, *asked, "--kv-cache", "8x64")
    assert [one.get("kv_cache") for one in found["models"]] == ["8x64", None]
    assert [one.get("attention") for one in found["models"]] == ["w4a16", None]
    ids = AutoTokenizer.from_pretrained(llama)(TEXT, add_special_tokens=False, verbose=False)["input_ids"][:100]
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    expected = [perplexity(one, ids, window=32, stride=8) for one in (WithLobcqCache(model, format="8x64"), model)]
    (result,) = found["results"]
    figures = [one["perplexity"] for one in result["models"]]
    assert figures == pytest.approx([one.perplexity for one in expected], rel=1e-5)
    assert result["together"]["kl_divergence"] > 0
    assert "keeps no keys and values" in lobcq.refused("eval", bert, "--against", bert, "--kv-cache", "8x64", code=2)


def test_all_of_a_language_model_in_one_table_and_one_file(
    lobcq: Run,
    quantized_llama: tuple[Path, dict[str, Any]],
    llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    choices, words, out = tmp_path / "choices.jsonl", tmp_path / "words.txt", tmp_path / "out.json"
    lines = [
        {"context": "The cat", "choices": ["sees the ball", "tree"], "answer": 0},
        {"context": "A dog finds the", "choices": ["under under under", "key"], "answer": "A"},
    ]
    choices.write_text("\n".join(map(json.dumps, lines)))
    words.write_text("\n".join(TEXT.splitlines()[:5]))
    files = ("--text", text_file, "--text", words, "--multiple-choice", choices, "--last-word", words)
    shown = lobcq("eval", quantized_llama[0], "--against", llama, *files, "--max-tokens", 60, "-o", out).stdout
    assert max(map(len, shown.splitlines())) <= 80
    for text in (
        "llama-4bit (LO-BCQ) against llama (float)",
        "choices.jsonl: 2 questions",
        "words.txt: 5 texts",
        "Perplexity",
        "KL divergence",
        "Same likeliest token",
        "acc_norm",
        "Same choice",
        "Last word right",
        "±",
        "points",
    ):
        assert text in shown
    found = json.loads(out.read_text())["results"]
    assert [one["kind"] for one in found] == ["text", "text", "multiple_choice", "last_word"]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for place, model in enumerate((lobcq_fx.load(quantized_llama[0]), LlamaForCausalLM.from_pretrained(llama).eval())):
        asked = [Question("The cat", ("sees the ball", "tree"), 0)]
        asked.append(Question("A dog finds the", ("under under under", "key"), 0))
        expected = multiple_choice(model, tokenizer, asked)
        assert found[2]["models"][place]["acc_norm"] == expected.acc_norm
        assert found[2]["models"][place]["chosen"] == list(expected.chosen)
        words_of_it = last_word(model, tokenizer, TEXT.splitlines()[:5]).to_dict()
        assert found[3]["models"][place] == pytest.approx(words_of_it, rel=1e-4)
    assert "exists: pass --overwrite" in lobcq.refused("eval", llama, *files, "-o", out, code=4)


def test_a_float_model_alone_with_default_window(lobcq: Run, llama: Path, text_file: Path) -> None:
    result = lobcq("eval", llama, "--text", text_file)
    assert "window 64, stride 32" in " ".join(result.stdout.replace("│", " ").split())
    assert "llama (float)" in result.stdout
    assert "KL" not in result.stdout
    assert "Score llama (float)" in result.stderr


def test_the_embedded_model_and_its_text_are_the_default(lobcq: Run) -> None:
    found = lobcq.json("eval", "default", "--max-tokens", 600, "--window", 256)
    (result,) = found["results"]
    assert result["source"] == "embedded heldout.txt"
    assert result["settings"]["stride"] == 128
    assert 10 < result["models"][0]["perplexity"] < 300  # an untrained model of its vocabulary has about 2048


def test_an_encoder_is_compared_by_cosine(lobcq: Run, quantized_bert: Path, bert: Path, text_file: Path) -> None:
    (found,) = lobcq.json("eval", quantized_bert, "--against", bert, "--text", text_file)["results"]
    tokenizer = AutoTokenizer.from_pretrained(bert)
    one, other = (
        sentence_embeddings(model, tokenizer, TEXT.splitlines(), max_length=64)
        for model in (lobcq_fx.load(quantized_bert), AutoModel.from_pretrained(bert).eval())
    )
    expected = cosine_similarity(one, other)
    assert found["together"]["mean_cosine"] == pytest.approx(expected.mean_cosine, abs=1e-6)
    assert 0.99 < found["together"]["mean_cosine"] < 1 - 1e-6
    assert found["settings"]["items"] == len(TEXT.splitlines())
    assert "Mean cosine" in lobcq("eval", quantized_bert, "--against", bert, "--text", text_file).stdout


def test_an_encoder_ranks_pairs_of_sentences(lobcq: Run, quantized_bert: Path, bert: Path, tmp_path: Path) -> None:
    lines = TEXT.splitlines()
    pairs = [SentencePair(lines[0], lines[place], float(place % 7)) for place in range(1, 20)]
    file = tmp_path / "sts.csv"
    file.write_text("".join(f"g\tf\ty\t{n}\t{one.score}\t{one.first}\t{one.second}\n" for n, one in enumerate(pairs)))
    (found,) = lobcq.json("eval", quantized_bert, "--against", bert, "--sts", file)["results"]
    tokenizer = AutoTokenizer.from_pretrained(bert)
    for figures, model in zip(
        found["models"], (lobcq_fx.load(quantized_bert), AutoModel.from_pretrained(bert).eval()), strict=True
    ):
        embeddings = sentence_embeddings(model, tokenizer, sentences_of(pairs), max_length=64)
        assert figures["spearman"] == pytest.approx(sts(embeddings, pairs).spearman, abs=1e-6)
    assert 0.99 < found["together"]["mean_cosine"] < 1
    assert "Spearman" in lobcq("eval", bert, "--sts", file).stdout


def test_what_cannot_be_measured(lobcq: Run, llama: Path, bert: Path, text_file: Path, tmp_path: Path) -> None:
    assert "pass --against" in lobcq.refused("eval", bert, "--text", text_file, code=2)
    assert "not the same kind" in lobcq.refused("eval", bert, "--against", llama, code=3)
    assert "takes at most 64" in lobcq("eval", llama, "--text", text_file, "--window", 65, code=2).stderr
    assert "leaves gaps" in lobcq("eval", llama, "--text", text_file, "--window", 8, "--stride", 9, code=2).stderr
    assert "--sts is for encoders" in lobcq.refused("eval", llama, "--sts", text_file, code=2)
    assert "predicts no next token" in lobcq.refused("eval", bert, "--last-word", text_file, code=2)
    (tmp_path / "short.txt").write_text("a")
    assert "too short" in lobcq("eval", llama, "--text", tmp_path / "short.txt", code=3).stderr
    assert "line 1: not JSON" in lobcq.refused("eval", llama, "--multiple-choice", text_file, code=3)
    (tmp_path / "long.jsonl").write_text(json.dumps({"context": "a", "choices": ["b", "c " * 99], "answer": 0}))
    refused = lobcq("eval", llama, "--multiple-choice", tmp_path / "long.jsonl", code=3).stderr
    assert "long.jsonl: ' c c" in refused
    assert "the model takes 64" in refused


def test_tokenizers_have_to_agree(lobcq: Run, llama: Path, text_file: Path, edited: Callable[..., Path]) -> None:
    other = edited(llama)
    saved = json.loads((other / "tokenizer.json").read_text())
    saved["model"]["merges"] = saved["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(saved))
    assert "make different tokens" in lobcq.refused("eval", llama, "--against", other, "--text", text_file, code=3)


def test_a_damaged_quantized_folder(
    lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], text_file: Path, edited: Callable[..., Path]
) -> None:
    folder = edited(quantized_llama[0], without=("graph.json",))
    assert "graph.json is missing" in lobcq("eval", folder, "--text", text_file, code=3).stderr


def test_bos_is_put_before_windows_where_the_tokenizer_does(
    lobcq: Run, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (found,) = lobcq.json("eval", tmp_path, "--text", text_file, "--max-tokens", 100)["results"]
    assert found["settings"] == {"window": 64, "stride": 32, "bos_token_id": 1, "tokens": 100}
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"][:100])
    expected = perplexity(LlamaForCausalLM.from_pretrained(llama).eval(), ids, window=64, stride=32, bos_token_id=1)
    assert found["models"][0]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
