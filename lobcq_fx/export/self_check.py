"""Runs the written ONNX model in ONNX Runtime and the torch graph on the same samples, and compares.

Where activations are encoded, fp32 rounding becomes another 4-bit code here and there, and from layer to layer the
difference grows: how far differs from model to model. So each output is allowed a multiple of what it changes by in
torch when every float parameter moves by about a rounding. The first layers' caches, which are outputs, hardly change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from lobcq_fx.errors import ExportError
from lobcq_fx.export.library import is_available, register
from lobcq_fx.export.signature import Signature

FOLDING_LIMIT = 1 << 20
"""Bytes of a constant that ONNX Runtime may compute at session creation: look-up tables, but no decoded weight."""

FOLDING_KEY = "optimization.constant_folding_max_output_size_in_bytes"

ROUNDING = 1e-6
"""How far parameters are moved, relative: what a sum of a few thousand fp32 terms depends on its order."""

MULTIPLE = 4
"""Of the root mean square change that an output may differ by: the seeds of both differences are independent."""

TOLERANCE = 1e-3
"""Root mean square, relative, that any output may differ by."""


@dataclass(frozen=True)
class Differences:
    """Relative to an output's largest magnitude: the largest between ONNX Runtime and torch, with function bodies and,
    where there is one, with the op library; and the largest that rounding makes in torch alone."""

    functions: float
    library: float | None
    rounding: float


def check_sessions(path: Path, signature: Signature, torch_graph: nn.Module) -> Differences:
    """Compare all outputs on the signature's samples; `torch_graph` has buffers alone, and gets others.

    Raises:
        ExportError: ONNX Runtime refuses the model, or an output differs.
    """
    expected = [_run(torch_graph, sample) for sample in signature.samples]
    _move_parameters(torch_graph)
    moved = [_run(torch_graph, sample) for sample in signature.samples]
    rounding = max(_largest(*pair) for call in zip(expected, moved, strict=True) for pair in zip(*call, strict=True))

    def check(use_library: bool) -> float:
        what = f"ONNX Runtime {ort.__version__} with {'the op library' if use_library else 'function bodies'}"
        largest = 0.0
        for call, actual in zip(
            zip(expected, moved, strict=True), _outputs(path, signature, use_library, what), strict=True
        ):
            for name, want, other, have in zip(signature.outputs, *call, actual, strict=True):
                _compare(name, want, other, have, what)
                largest = max(largest, _largest(want, have))
        return largest

    return Differences(check(use_library=False), check(use_library=True) if is_available() else None, rounding)


def _run(graph: nn.Module, sample: Sequence[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        return [output.double() for output in graph([tensor.clone() for tensor in sample])]


def _move_parameters(graph: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for module in graph.modules():
        for name, tensor in list(module.named_buffers(recurse=False)):
            if tensor.dtype == torch.float32 and tensor.dim() > 0:  # no part of a packed weight
                noise = torch.randn(tensor.shape, generator=generator).mul_(ROUNDING).add_(1)
                setattr(module, name, tensor * noise)


def _outputs(path: Path, signature: Signature, use_library: bool, what: str) -> Iterator[list[Tensor]]:
    try:
        session = _session(path, use_library)
        for sample in signature.samples:
            feeds = {name: tensor.numpy() for name, tensor in zip(signature.inputs, sample, strict=True)}
            yield [torch.from_numpy(np.array(output, dtype=np.float64)) for output in session.run(None, feeds)]
    except ExportError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        remedy = "a newer onnxruntime; before 1.22, fuse=False"
        raise ExportError(f"{what} refuses the exported model: {error}. Remedy: {remedy}") from error


def _session(path: Path, use_library: bool) -> Any:
    """A session on the CPU that keeps packed weights packed."""
    options = ort.SessionOptions()
    options.add_session_config_entry(FOLDING_KEY, str(FOLDING_LIMIT))
    options.log_severity_level = 4  # errors are raised as well
    if use_library:
        register(options)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _compare(name: str, want: Tensor, moved: Tensor, have: Tensor, what: str) -> None:
    if want.shape != have.shape:
        raise ExportError(f"output {name} has shape {list(have.shape)} in {what}, {list(want.shape)} in torch")
    allowed = TOLERANCE * _rms(want) + MULTIPLE * _rms(moved - want)
    if not _rms(have - want) <= allowed:
        raise ExportError(
            f"output {name} differs by {_rms(have - want):.3g} between {what} and torch, where values are about"
            f" {_rms(want):.3g} and rounding explains {allowed:.3g}: please report this, with the model's configuration"
        )


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def _largest(want: Tensor, have: Tensor) -> float:
    """Of the differences, relative to the largest magnitude."""
    if not want.numel():
        return 0.0
    return float((have - want).abs().max() / want.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
