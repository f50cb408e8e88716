"""Resident memory of one contender of benchmarks/model/generation.py, loaded in a process of its own (Linux only)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.model.folders import CHECKED_TOKENS, Folders, prompt
from benchmarks.model.onnx_model import OnnxModel
from benchmarks.model.torch_model import TorchModel, load_torch_model

MIB = 1 << 20


@torch.no_grad()
def measure_memory(folders: Folders, name: str) -> dict[str, Any]:
    """MiB on disk, and resident above what the imported modules take: loaded, after an eager prompt and step, at most.

    What is mapped from a file counts from the first time it is read, therefore the prompt and the step.
    """
    torch.set_num_threads(1)
    if name.startswith("ORT"):
        import onnxruntime  # noqa: F401
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls back to what is resident now
    is_onnx = name.startswith("ORT")
    model: Any = (
        OnnxModel(folders.onnx(name), 1) if is_onnx else TorchModel(load_torch_model(folders, name), compiled=False)
    )
    loaded = status_mib("VmRSS") - before
    logits, cache = model.prefill(prompt(CHECKED_TOKENS))
    model.step(logits.argmax().view(1, 1), cache)
    return {
        "contender": name,
        "disk_mib": folders.bytes_of(name) / MIB,
        "loaded_mib": loaded,
        "used_mib": status_mib("VmRSS") - before,
        "peak_mib": status_mib("VmHWM") - before,
    }


def status_mib(field: str) -> float:
    """A size in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
