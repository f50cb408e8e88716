"""Memory and time to the first token of one contender of benchmarks/model/generation.py, loaded in a process of its own
(Linux only)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.model.folders import CHECKED_TOKENS, LLAMA_CPP, Folders, prompt
from benchmarks.model.llama_cpp.client import LlamaCpp, LlamaCppModel
from benchmarks.model.onnx_model import OnnxModel
from benchmarks.model.torch_model import TorchModel, load_torch_model

MIB = 1 << 20


@torch.no_grad()
def measure_memory(folders: Folders, name: str, llama_cpp: Path | None = None) -> dict[str, Any]:
    """MiB on disk, and resident above what the imported modules take: loaded, after an eager prompt and step, at most.

    What is mapped from a file counts from the first time it is read, therefore the prompt and the step. And, with one
    thread, seconds from the imported modules to the first token behind the prompt; files may be in the system's cache.
    """
    if name in LLAMA_CPP:
        assert llama_cpp is not None, f"{name} has no interpreter"
        with LlamaCpp(llama_cpp) as process:
            process.call("versions")  # its modules are imported
            return _measured(folders, name, lambda: _of_llama_cpp(process, folders.gguf(name)), str(process.pid))
    torch.set_num_threads(1)
    if name.startswith("ORT"):
        import onnxruntime  # noqa: F401
    return _measured(folders, name, lambda: _in_this_process(folders, name), "self")


def _measured(folders: Folders, name: str, load: Callable[[], Callable[[], float]], process: str) -> dict[str, Any]:
    """load: returns what reads a prompt and makes a step; its seconds to the first token. process: where, in /proc."""
    before = status_mib("VmRSS", process)
    Path(f"/proc/{process}/clear_refs").write_text("5")  # the high-water mark falls back to what is resident now
    started = time.perf_counter()
    use = load()
    load_seconds = time.perf_counter() - started
    loaded = status_mib("VmRSS", process) - before
    first_token_seconds = load_seconds + use()
    return {
        "contender": name,
        "disk_mib": folders.bytes_of(name) / MIB,
        "loaded_mib": loaded,
        "used_mib": status_mib("VmRSS", process) - before,
        "peak_mib": status_mib("VmHWM", process) - before,
        "load_seconds": load_seconds,
        "first_token_seconds": first_token_seconds,
    }


def _in_this_process(folders: Folders, name: str) -> Callable[[], float]:
    model: Any = (
        OnnxModel(folders.onnx(name), 1)
        if name.startswith("ORT")
        else TorchModel(load_torch_model(folders, name), compiled=False)
    )

    def use() -> float:
        started = time.perf_counter()
        logits, cache = model.prefill(prompt(CHECKED_TOKENS))
        token = logits.argmax(dim=-1, keepdim=True)
        seconds = time.perf_counter() - started
        model.step(token, cache)
        return seconds

    return use


def _of_llama_cpp(process: LlamaCpp, path: Path) -> Callable[[], float]:
    model = LlamaCppModel(process, path, 1)
    return lambda: model.generate(prompt(CHECKED_TOKENS), 2).first_seconds


def status_mib(field: str, process: str = "self") -> float:
    """A size in /proc/<process>/status."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
