"""Perplexity of small trained language models in fp32, with 4-bit weights, and with 4-bit weights and activations.

    python -m benchmarks.quality.perplexity                   # --only "embedded default"

The embedded model is measured on its held-out text by a sliding window, and calibrated on files of the standard library
that it was trained on. If the environment variable LOBCQ_TEST_DATA
names a folder with models/stories260K and models/tinystories-656k, these are measured on 80 stories, a story a
sequence that begins with BOS: text/tinystories_196K.txt cut before each paragraph that starts with "Once", each story
cut off at the model's 512 tokens; the others calibrate. Everything is at the default 4.5 bits.
Writes benchmarks/results/perplexity.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lobcq_fx
from lobcq_fx.evaluation import PerplexityResult, perplexity, perplexity_of_sequences

RESULT = Path(__file__).parents[1] / "results" / "perplexity.json"
STORY_MODELS = ("stories260K", "tinystories-656k")
EMBEDDED = "embedded default"
CALIBRATING = ("argparse.py",)
"""Files of the standard library, which are in the training text of the embedded model."""
STORIES = 80
WINDOW, STRIDE = 512, 256
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a16": ("fast", {"mode": "w4a16"}),
    "w4a4": ("fast", {}),
    "w4a16 balanced": ("balanced", {"mode": "w4a16"}),
    "w4a8 balanced": ("balanced", {"mode": "w4a8"}),
    "w4a4 balanced": ("balanced", {}),
    "w4a4 best": ("best", {}),
    "4.5 bits by need": ("best", {"bits": 4.5}),
    "4.5 bits by need, activations 5": ("best", {"bits": 4.5, "activation_bits": 5.0}),
}
"""Recipe and settings."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--only", help="the model to measure; the rows of others stay")
    parser.add_argument("--max-tokens", type=int, help="of the embedded model's held-out text")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    measures: dict[str, Callable[[], dict[str, Any]]] = {EMBEDDED: partial(measure_embedded, arguments.max_tokens)}
    data = os.environ.get("LOBCQ_TEST_DATA")
    if data is None:
        print("the story models are left out: LOBCQ_TEST_DATA is not set\n")
    else:
        measures |= {name: partial(measure_stories, Path(data), name) for name in STORY_MODELS}
    found = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"] if arguments.only else []
    by_model = {row["model"]: row for row in found}
    by_model |= {name: measure() for name, measure in measures.items() if arguments.only in (None, name)}
    rows = list(by_model.values())
    result = {
        "measure": "perplexity",
        "format": lobcq_fx.LobcqConfig().format.name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"| model | parameters | tokens scored | fp32 | {' | '.join(WAYS)} |\n|{'---|' * (4 + len(WAYS))}")
    for row in rows:
        rises = " | ".join(
            f"{row[way]:.3f} ({100 * (row[way] / row['fp32'] - 1):+.1f} %)" if way in row else "-" for way in WAYS
        )
        print(f"| {row['model']} | {row['parameters']:,} | {row['tokens']:,} | {row['fp32']:.3f} | {rises} |")


def measure_embedded(max_tokens: int | None) -> dict[str, Any]:
    """The embedded model on the held-out text beside it."""
    folder = lobcq_fx.default_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    window = min(WINDOW, model.config.max_position_embeddings)
    stride = window - STRIDE
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text(encoding="utf-8") for name in CALIBRATING]
    others = torch.tensor([token for one in texts for token in tokenizer(one, verbose=False)["input_ids"]])
    calibration = list(others[: len(others) // window * window].view(-1, 1, window))
    row = in_all_ways(model, calibration, lambda one: perplexity(one, ids, window=window, stride=stride, batch_size=8))
    return {"model": EMBEDDED, "text": f"held-out text, window {window}, stride {stride}", **row}


def measure_stories(data: Path, name: str) -> dict[str, Any]:
    """A story model on the first stories, each a sequence of its own; the others calibrate."""
    folder = data / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (data / "text" / "tinystories_196K.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in re.split(r"\n+(?=Once)", text)]
    ids = [tokenizer(story, add_special_tokens=False, verbose=False)["input_ids"] for story in stories]
    length, bos = model.config.max_position_embeddings, model.config.bos_token_id
    calibration = [torch.tensor([[bos, *story][:length]]) for story in ids[STORIES:]]
    ids = ids[:STORIES]
    row = in_all_ways(
        model,
        calibration,
        lambda one: perplexity_of_sequences(one, ids, max_length=length, bos_token_id=bos, batch_size=8),
    )
    return {"model": name, "text": f"{STORIES} stories, at most {length} tokens each, BOS first", **row}


def in_all_ways(
    model: nn.Module, calibration: list[Tensor], score: Callable[[nn.Module], PerplexityResult]
) -> dict[str, Any]:
    """Perplexity of the model and of its quantized forms."""
    reference = score(model)
    row: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": reference.tokens,
        "fp32": reference.perplexity,
    }
    for way, (recipe, settings) in WAYS.items():
        config = lobcq_fx.LobcqConfig.of_recipe(recipe, **settings)
        quantized = lobcq_fx.quantize(model, calibration if config.needs_calibration else None, config)
        row[way] = score(quantized).perplexity
        row["parameter_coverage"] = quantized.inventory.parameter_coverage
    return row


if __name__ == "__main__":
    main()
