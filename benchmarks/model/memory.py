"""Resident memory of one contender of benchmarks/model/generation.py, loaded in a process of its own (Linux only)."""

from __future__ import annotations

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

    What is mapped from a file counts from the first time it is read, therefore the prompt and the step.
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


def _measured(folders: Folders, name: str, load: Callable[[], Callable[[], object]], process: str) -> dict[str, Any]:
    """load: returns what reads a prompt and makes a step. process: where that is, in /proc."""
    before = status_mib("VmRSS", process)
    Path(f"/proc/{process}/clear_refs").write_text("5")  # the high-water mark falls back to what is resident now
    use = load()
    loaded = status_mib("VmRSS", process) - before
    use()
    return {
        "contender": name,
        "disk_mib": folders.bytes_of(name) / MIB,
        "loaded_mib": loaded,
        "used_mib": status_mib("VmRSS", process) - before,
        "peak_mib": status_mib("VmHWM", process) - before,
    }


def _in_this_process(folders: Folders, name: str) -> Callable[[], object]:
    model: Any = (
        OnnxModel(folders.onnx(name), 1)
        if name.startswith("ORT")
        else TorchModel(load_torch_model(folders, name), compiled=False)
    )

    def use() -> object:
        logits, cache = model.prefill(prompt(CHECKED_TOKENS))
        return model.step(logits.argmax(dim=-1, keepdim=True), cache)

    return use


def _of_llama_cpp(process: LlamaCpp, path: Path) -> Callable[[], object]:
    model = LlamaCppModel(process, path, 1)
    return lambda: model.decode_seconds(prompt(CHECKED_TOKENS), 1)


def status_mib(field: str, process: str = "self") -> float:
    """A size in /proc/<process>/status."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
