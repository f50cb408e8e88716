"""The commands on an encoder-decoder of text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

import lobcq_fx
from tests.cli.conftest import Run


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = BartConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=96, decoder_ffn_dim=96,
        encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=len(tokenizer), max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=3, decoder_start_token_id=1, forced_eos_token_id=None,
        init_std=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "bart"
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized_bart(lobcq: Run, bart: Path) -> Path:
    folder = bart.parent / "bart-4bit"
    assert lobcq.json("quantize", bart, "-o", folder)["layers_quantized"] == 16
    return folder


def test_the_answer_is_what_the_model_generates(lobcq: Run, bart: Path, quantized_bart: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bart)
    ids = tokenizer("The cat sees", return_tensors="pt")["input_ids"]
    models = {bart: BartForConditionalGeneration.from_pretrained(bart), quantized_bart: lobcq_fx.load(quantized_bart)}
    for folder, model in models.items():
        arguments = ("generate", folder, "-p", "The cat sees", "--max-new-tokens", 6)
        found = lobcq.json(*arguments)
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0]
        assert found["tokens"] == expected[1:].tolist()
        assert found["prompt_tokens"] == ids.shape[1]
        shown = lobcq(*arguments).stdout.strip()
        assert shown == found["text"].strip()  # an answer does not go on where the prompt ends


def test_the_page_of_a_saved_model_shows_how_to_ask_it(quantized_bart: Path) -> None:
    page = (quantized_bart / "README.md").read_text(encoding="utf-8")
    assert "skip_special_tokens=True" in page
    assert "lobcq eval" not in page


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (("generate", "BART", "-p", "x", "--kv-cache", "8x64"), 2, "--kv-cache: BartForConditionalGeneration"),
        (("generate", "BART", "-p", "x", "--onnx"), 2, "--onnx: BartForConditionalGeneration"),
        (("chat", "BART"), 3, "pass a causal language model"),
        (("eval", "BART"), 3, "model(..., labels=...).loss"),
        (("calibrate", "BART", "-o", "OUT.json"), 3, "calibrated on inputs with their answers"),
        (("quantize", "BART", "-o", "OUT", "--calibrate", "TEXT"), 3, "calibrated on inputs with their answers"),
    ],
)
def test_what_commands_cannot_do_with_it_is_refused_by_name(
    lobcq: Run, bart: Path, text_file: Path, tmp_path: Path, command: tuple[str, ...], code: int, message: str
) -> None:
    places = {"BART": bart, "OUT": tmp_path / "out", "OUT.json": tmp_path / "out.json", "TEXT": text_file}
    found = lobcq.refused(*(places.get(word, word) for word in command), code=code)
    assert message.replace(" ", "") in found.replace(" ", "")
