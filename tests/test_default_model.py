"""The shipped default model: what is in its folder, that it loads offline, and that it has learnt its language."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import lobcq_fx

FOLDER = Path(lobcq_fx.__file__).parent / "assets" / "default_model"
FILES = {
    "LICENSE-heldout.txt",
    "README.md",
    "config.json",
    "generation_config.json",
    "heldout.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_report.json",
    "unigram_counts.json",
}
PROMPT = "def __init__(self"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def heldout(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Token ids [tokens] of the first 12,000 characters of the held-out text."""
    text = (FOLDER / "heldout.txt").read_text(encoding="utf-8")[:12_000]
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def test_the_folder_holds_its_files_in_at_most_8_megabytes():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(sizes) == FILES
    assert sum(sizes.values()) <= 8_000_000
    assert 60_000 <= sizes["heldout.txt"] <= 100_000


def test_config_names_the_stored_dtype(model: PreTrainedModel):
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    stored = (FOLDER / "model.safetensors").stat().st_size
    parameters = sum(p.numel() for p in model.parameters())
    # Two bytes a parameter plus the safetensors header: nothing is stored twice, nothing in fp32.
    assert 2 * parameters < stored < 2 * parameters + 10_000
    assert model.dtype == torch.float32


def test_no_machine_path_is_in_the_text_files():
    for path in FOLDER.iterdir():
        if path.suffix in {".json", ".md"}:
            text = path.read_text(encoding="utf-8")
            assert "/root/" not in text
            assert "/home/" not in text


def test_perplexity_is_far_below_the_unigram_baseline(model: PreTrainedModel, heldout: Tensor):
    counts = torch.tensor(json.loads((FOLDER / "unigram_counts.json").read_text()), dtype=torch.float64) + 1
    windows = heldout[: len(heldout) // 256 * 256].view(-1, 256)  # [W, 256]
    targets = windows[:, 1:]
    with torch.inference_mode():
        log_probabilities = model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
    nats = -log_probabilities.gather(-1, targets[..., None]).mean().item()
    unigram_nats = -(counts / counts.sum()).log()[targets].mean().item()
    assert len(windows) >= 10
    # A factor of ten at least in perplexity: a model that ignores its context stays at a factor of one.
    assert math.exp(nats) < math.exp(unigram_nats) / 10


def test_long_contexts_are_usable(model: PreTrainedModel, heldout: Tensor):
    """The last positions of a 1024-token window are predicted no worse than with a 256-token window."""
    tokens = heldout[None, :1024]
    with torch.inference_mode():
        far = model(input_ids=tokens).logits[0, 896:-1]
        near = model(input_ids=tokens[:, -256:]).logits[0, 128:-1]
    targets = tokens[0, 897:]
    far_nats = torch.nn.functional.cross_entropy(far, targets).item()
    near_nats = torch.nn.functional.cross_entropy(near, targets).item()
    # 0.1 nats covers the noise of 127 tokens; rope positions never trained on cost far more.
    assert far_nats < near_nats + 0.1


def test_the_report_agrees_with_the_shipped_files(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel):
    report = json.loads((FOLDER / "training_report.json").read_text())
    text = (FOLDER / "heldout.txt").read_text(encoding="utf-8")
    assert report["training"]["parameters"] == model.num_parameters()
    assert report["evaluation"]["heldout_bytes"] == len(text.encode())
    assert report["evaluation"]["heldout_tokens_scored"] == len(tokenizer(text, verbose=False)["input_ids"]) - 1
    counts = json.loads((FOLDER / "unigram_counts.json").read_text())
    assert sum(counts) == report["training"]["training_tokens"]


def test_greedy_generation_is_finite_and_decodes(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel):
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert all(torch.isfinite(logits).all() for logits in out.logits)
    text = tokenizer.decode(out.sequences[0], skip_special_tokens=True)
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT)
    assert "\N{REPLACEMENT CHARACTER}" not in text


def test_left_padded_batch_generates_what_single_prompts_do(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel):
    prompts = [PROMPT, "import os\nimport sys\n\n\nclass Reader:\n    "]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, 0] == 0  # the shorter prompt is padded on the left
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, -8:]
    for prompt, tokens in zip(prompts, together, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert torch.equal(alone[0, -8:], tokens)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "def f(x):\n\treturn x  # tab, two spaces\n\n\n",
        " leading and trailing ",
        "naïve Ångström e\u0301 日本語 العربية 🙂👩‍🔬 \u200b\ufeff",
        "a\x00b\r\nc\u2028d",
        "don 't split , please .",
    ],
)
def test_tokenizer_round_trips_text(tokenizer: PreTrainedTokenizerFast, text: str):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
