"""The llama.cpp contenders' files, made of the float model's folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.model.folders import CHECKED_TOKENS, LLAMA_CPP, TORCH_FP32, Folders, prompt
from benchmarks.model.llama_cpp.client import LlamaCpp, LlamaCppModel
from benchmarks.model.speed import OTHER_TOLERANCE, relative

EXACT = "llama.cpp fp32"
"""What the others are quantized from; no contender."""


def save_llama_cpp_models(folders: Folders, names: Sequence[str], python: Path) -> None:
    """Convert the float model, see that llama.cpp computes with it what torch does, and quantize it.

    Its keys and values are in fp16, of which the fp32 model's error comes.
    """
    exact = folders.gguf(EXACT)
    exact.parent.mkdir()
    with LlamaCpp(python) as process:
        print("converting to GGUF", flush=True)
        process.call("write", folder=str(folders.of(TORCH_FP32)), target=str(exact))
        logits = LlamaCppModel(process, exact, os.cpu_count() or 1).logits(prompt(CHECKED_TOKENS))
        error = relative(logits[0], folders.logits()[TORCH_FP32])
        if not error <= OTHER_TOLERANCE:
            raise SystemExit(f"the GGUF file is wrong: relative error {error:.3g} of its logits, so no speed for it")
        for name, kind in LLAMA_CPP.items():
            if name in names:
                print(f"quantizing {name}", flush=True)
                folders.of(name).mkdir()
                process.call("quantize", source=str(exact), target=str(folders.gguf(name)), kind=kind)
    exact.unlink()
