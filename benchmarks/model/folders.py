"""A Llama-shaped model with random weights, saved once for every contender of benchmarks/model/generation.py.

Beside the folders lie the logits that each contender is checked against: those of the float model, and those of the
float model with decoded weights and fake-quantized activations, for which `lobcq_fx.format` alone is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lobcq_fx
from benchmarks.model.onnx_model import export_onnx, quantize_onnx
from lobcq_fx.config import DEFAULT_EXCLUDE
from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, encode_int8, universal_codebooks

TORCH_FP32, TORCH_BF16, ORT_FP32, ORT_INT4 = "torch fp32", "torch bf16", "ORT fp32", "ORT int4"
W4A4, W4A4_HEAD, W4A8, W4A16 = "lobcq W4A4", "lobcq W4A4, head W4A16", "lobcq W4A8, head too", "lobcq W4A16"
LLAMA_CPP = {"llama.cpp Q4_0": "Q4_0", "llama.cpp Q4_K": "Q4_K"}
"""Contenders in llama.cpp, and what it calls their weights' format."""

NAMES = (TORCH_FP32, TORCH_BF16, W4A4, W4A4_HEAD, W4A8, W4A16, ORT_FP32, ORT_INT4, *LLAMA_CPP)

ALL_LINEARS = tuple(pattern for pattern in DEFAULT_EXCLUDE if pattern not in ("@head", "*lm_head"))
CONFIGS = {
    W4A4: lobcq_fx.LobcqConfig(),
    W4A4_HEAD: lobcq_fx.LobcqConfig(exclude=ALL_LINEARS, overrides={"*lm_head": {"mode": "w4a16"}}),
    W4A8: lobcq_fx.LobcqConfig(mode="w4a8", exclude=ALL_LINEARS),
    W4A16: lobcq_fx.LobcqConfig(mode="w4a16"),
}

VOCABULARY = 32000
CHECKED_TOKENS = 48
"""Length of the prompt whose logits are compared."""


@dataclass(frozen=True)
class Folders:
    """Where the saved models are."""

    root: Path

    def of(self, name: str) -> Path:
        """A contender's folder."""
        return self.root / name.replace(", ", "-").replace(" ", "-")

    def onnx(self, name: str) -> Path:
        """An ONNX contender's graph."""
        return self.of(name) / "model.onnx"

    def gguf(self, name: str) -> Path:
        """A llama.cpp contender's file."""
        return self.of(name) / "model.gguf"

    def bytes_of(self, name: str) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for file in self.of(name).rglob("*") if file.is_file())

    def logits(self) -> dict[str, Tensor]:
        """Reference logits [V] of the last position of the checked prompt, by contender."""
        loaded: dict[str, Tensor] = torch.load(self.root / "logits.pt", weights_only=True)
        return loaded


def model_config(layers: int) -> LlamaConfig:
    """About 1.1 billion parameters with 16 layers."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def prompt(length: int, batch: int = 1) -> Tensor:
    """Token ids [batch, length], always the same."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def save_torch_models(folders: Folders, layers: int, names: tuple[str, ...]) -> None:
    """Write the torch contenders' folders and the reference logits."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(layers)).eval()
    model.save_pretrained(folders.of(TORCH_FP32))
    exact = _last_logits(model)
    logits = dict.fromkeys((TORCH_FP32, TORCH_BF16, ORT_FP32, ORT_INT4, *LLAMA_CPP), exact)
    for name in names:
        if name in CONFIGS:
            print(f"saving {name}", flush=True)
            lobcq_fx.quantize(model, config=CONFIGS[name]).save_pretrained(folders.of(name))
    logits |= _fake_quantized_logits(model)
    torch.save(logits, folders.root / "logits.pt")
    del model
    if TORCH_BF16 in names:
        half = LlamaForCausalLM.from_pretrained(folders.of(TORCH_FP32), dtype=torch.bfloat16)
        half.save_pretrained(folders.of(TORCH_BF16))


@torch.no_grad()
def save_onnx_models(folders: Folders, names: tuple[str, ...]) -> None:
    """Write the ONNX contenders' folders; the fp32 one is needed for the other."""
    print("exporting to ONNX", flush=True)
    model = LlamaForCausalLM.from_pretrained(folders.of(TORCH_FP32)).eval()
    export_onnx(model, folders.onnx(ORT_FP32))
    del model
    if ORT_INT4 in names:
        quantize_onnx(folders.onnx(ORT_FP32), folders.onnx(ORT_INT4))


def _last_logits(model: nn.Module) -> Tensor:
    logits: Tensor = model(prompt(CHECKED_TOKENS), logits_to_keep=1).logits[0, -1]
    return logits


def _fake_quantized_logits(model: nn.Module) -> dict[str, Tensor]:
    """What each of our contenders should give. The model's weights are decoded ones afterwards."""
    spec, linears = FormatSpec(), {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    books = universal_codebooks(spec.num_codebooks)

    def four_bits(rows: Tensor) -> Tensor:
        return decode(encode(rows, spec, books, absmax_row_scale(rows)))

    def eight_bits(rows: Tensor) -> Tensor:
        return decode(encode_int8(rows, spec.array_size))

    def logits_of(encoded: Callable[[Tensor], Tensor], layers: Iterable[nn.Module]) -> Tensor:
        def hook(_module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            return encoded(inputs[0].reshape(-1, inputs[0].shape[-1])).view(inputs[0].shape)

        hooks = [layer.register_forward_pre_hook(hook) for layer in layers]
        logits = _last_logits(model)
        for each in hooks:
            each.remove()
        return logits

    head = linears.pop("lm_head")
    for linear in linears.values():
        linear.weight.copy_(decode(encode(linear.weight, spec, books, search_scales=True)))
    logits = {W4A16: _last_logits(model), W4A4: logits_of(four_bits, linears.values())}
    head.weight.copy_(decode(encode(head.weight, spec, books, search_scales=True)))
    logits[W4A4_HEAD] = logits_of(four_bits, linears.values())
    logits[W4A8] = logits_of(eight_bits, (*linears.values(), head))
    return logits
