"""Model folders as a user would have them, and the application run in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from lobcq_fx.cli import app
from lobcq_fx.kernels.cpu.installed import cpu_core

TEXT = "\n".join(
    f"{subject} {verb} the {thing} under a tree." for subject in ("The cat", "A dog", "Some bird")
    for verb in ("sees", "finds", "wants", "hides") for thing in ("ball", "stone", "small red fish", "old shoe", "key")
)  # fmt: skip


class Run:
    """Runs `lobcq` and keeps what it printed."""

    def __call__(self, *arguments: object, code: int = 0, stdin: str = "") -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
        assert result.exit_code == code, f"exit code {result.exit_code}:\n{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr
        return result

    def json(self, *arguments: object) -> dict[str, Any]:
        """The JSON object on standard output, with nothing around it."""
        values = json.loads(self(*arguments, "--json").stdout)
        assert isinstance(values, dict)
        return values

    def refused(self, *arguments: object, code: int) -> str:
        """The message of a failure, on one line; standard output must be empty."""
        result = self(*arguments, code=code)
        assert result.stdout == ""
        return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(autouse=True)
def _traced_once(traced_once: None) -> None:
    """Most commands here quantize one model."""


@pytest.fixture(scope="session")
def lobcq() -> Run:
    return Run()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=64, pad_token_id=3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "bert"
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized_llama(lobcq: Run, llama: Path, text_file: Path) -> tuple[Path, dict[str, Any]]:
    """Quantized with a calibration text, and what the command printed."""
    folder = llama.parent / "llama-4bit"
    return folder, lobcq.json("quantize", llama, "-o", folder, "--calibrate", text_file, "--calibration-length", 32)


@pytest.fixture(scope="session")
def exported_llama(lobcq: Run, quantized_llama: tuple[Path, dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """An exported folder, with the op library where there is one, and what the command printed."""
    folder = quantized_llama[0].parent / "llama-onnx"
    library = () if cpu_core() is None else ("--include-library",)
    return folder, lobcq.json("export", "onnx", quantized_llama[0], "-o", folder, *library)


@pytest.fixture(scope="session")
def quantized_bert(lobcq: Run, bert: Path) -> Path:
    folder = bert.parent / "bert-4bit"
    lobcq("quantize", bert, "-o", folder)
    return folder


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model folder with changed config.json values and some files gone."""

    def edit(folder: Path, *, without: tuple[str, ...] = (), **config: Any) -> Path:
        copy = tmp_path / "edited"
        shutil.copytree(folder, copy)
        for pattern in without:
            for file in copy.glob(pattern):
                file.unlink()
        if config:
            values = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**values, **config}))
        return copy

    return edit
