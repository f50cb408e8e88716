from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM

import lobcq_fx
from lobcq_fx.evaluation import cosine_similarity, perplexity, sentence_embeddings
from tests.cli.conftest import TEXT, Run


def test_perplexity_against_the_float_model(
    lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]], llama: Path, text_file: Path
) -> None:
    folder, _ = quantized_llama
    found = lobcq.json(
        "eval", folder, "--against", llama, "--text", text_file, "--window", 32, "--stride", 8, "--max-tokens", 200
    )
    ids = AutoTokenizer.from_pretrained(llama)(TEXT, add_special_tokens=False, verbose=False)["input_ids"][:200]
    models = {"llama-4bit": lobcq_fx.load(folder), "llama": LlamaForCausalLM.from_pretrained(llama).eval()}
    assert found["measure"] == "perplexity"
    assert [row["model"] for row in found["models"]] == list(models)
    assert [row["quantized"] for row in found["models"]] == [True, False]
    for row, model in zip(found["models"], models.values(), strict=True):
        expected = perplexity(model, ids, window=32, stride=8)
        assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
        assert (row["tokens"], row["window"], row["stride"]) == (199, 32, 8)
        assert row["bos_before_each_window"] is False
    one, other = (row["perplexity"] for row in found["models"])
    assert found["perplexity_ratio"] == pytest.approx(one / other)


def test_a_float_model_alone_with_default_window(lobcq: Run, llama: Path, text_file: Path) -> None:
    result = lobcq("eval", llama, "--text", text_file)
    assert "window 64, stride 32" in result.stdout
    assert "float" in result.stdout
    assert "Score llama (float)" in result.stderr


def test_the_embedded_model_and_its_text_are_the_default(lobcq: Run) -> None:
    found = lobcq.json("eval", "default", "--max-tokens", 600, "--window", 256)
    (row,) = found["models"]
    assert found["text"] == "embedded heldout.txt"
    assert row["stride"] == 128
    assert 10 < row["perplexity"] < 300  # an untrained model of its vocabulary has about 2048


def test_an_encoder_is_compared_by_cosine(lobcq: Run, quantized_bert: Path, bert: Path, text_file: Path) -> None:
    found = lobcq.json("eval", quantized_bert, "--against", bert, "--text", text_file)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    one, other = (
        sentence_embeddings(model, tokenizer, TEXT.splitlines(), max_length=64)
        for model in (lobcq_fx.load(quantized_bert), AutoModel.from_pretrained(bert).eval())
    )
    expected = cosine_similarity(one, other)
    assert found["mean_cosine"] == pytest.approx(expected.mean_cosine, abs=1e-6)
    assert 0.99 < found["mean_cosine"] < 1 - 1e-6
    assert found["sentences"] == len(TEXT.splitlines())
    assert "mean" in lobcq("eval", quantized_bert, "--against", bert, "--text", text_file).stdout


def test_what_cannot_be_measured(lobcq: Run, llama: Path, bert: Path, text_file: Path, tmp_path: Path) -> None:
    assert "pass --against" in lobcq.refused("eval", bert, "--text", text_file, code=2)
    assert "not the same kind" in lobcq.refused("eval", bert, "--against", llama, code=3)
    assert "takes at most 64" in lobcq("eval", llama, "--text", text_file, "--window", 65, code=2).stderr
    assert "leaves gaps" in lobcq("eval", llama, "--text", text_file, "--window", 8, "--stride", 9, code=2).stderr
    (tmp_path / "short.txt").write_text("a")
    assert "too short" in lobcq("eval", llama, "--text", tmp_path / "short.txt", code=3).stderr


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
    (row,) = lobcq.json("eval", tmp_path, "--text", text_file, "--max-tokens", 100)["models"]
    assert row["bos_before_each_window"] is True
    assert row["tokens"] == 100
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"][:100])
    expected = perplexity(LlamaForCausalLM.from_pretrained(llama).eval(), ids, window=64, stride=32, bos_token_id=1)
    assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
