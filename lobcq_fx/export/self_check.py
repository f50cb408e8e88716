"""Runs the written ONNX model in ONNX Runtime and the torch graph on the same samples, and compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from lobcq_fx.errors import ExportError
from lobcq_fx.export.signature import Signature

FOLDING_LIMIT = 1 << 20
"""Bytes of a constant that ONNX Runtime may compute at session creation: look-up tables, but no decoded weight."""

FOLDING_KEY = "optimization.constant_folding_max_output_size_in_bytes"

TOLERANCE = 1e-3
"""Relative, root mean square. What two correct programs may differ by: fp32 sums in another order, which move a scalar
to the neighbouring code now and then."""


def check_session(path: Path, signature: Signature, torch_graph: Callable[[list[Tensor]], Sequence[Tensor]]) -> float:
    """Compare all outputs on the signature's samples.

    Returns:
        The largest difference, relative to the largest magnitude of the output that it is in.

    Raises:
        ExportError: ONNX Runtime refuses the model, or an output differs.
    """
    largest = 0.0
    try:
        session = function_session(path)
        for sample in signature.samples:
            actual = session.run(None, {name: x.numpy() for name, x in zip(signature.inputs, sample, strict=True)})
            with torch.inference_mode():
                expected = torch_graph([tensor.clone() for tensor in sample])
            for output in zip(signature.outputs, expected, actual, strict=True):
                largest = max(largest, _difference(*output))
    except ExportError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise ExportError(f"ONNX Runtime {ort.__version__} refuses the exported model: {error}") from error
    return largest


def function_session(path: Path) -> Any:
    """A session on the CPU, without the op library, that keeps packed weights packed."""
    options = ort.SessionOptions()
    options.add_session_config_entry(FOLDING_KEY, str(FOLDING_LIMIT))
    options.log_severity_level = 4  # errors are raised as well
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _difference(name: str, expected: Tensor, actual: Any) -> float:
    """The largest of an output, relative to its largest magnitude."""
    want, have = expected.double(), torch.from_numpy(np.array(actual, dtype=np.float64))
    runtime = f"ONNX Runtime {ort.__version__}"
    if want.shape != have.shape:
        raise ExportError(f"output {name} has shape {list(have.shape)} in {runtime}, {list(want.shape)} in torch")
    if want.numel() == 0:
        return 0.0
    difference = (have - want).abs()
    tiny = torch.finfo(torch.float32).tiny
    scale = want.square().mean().sqrt().clamp(min=tiny)
    if not difference.square().mean().sqrt() <= TOLERANCE * scale:
        raise ExportError(
            f"output {name} differs by up to {difference.max():.3g} between {runtime} and torch, where values are about"
            f" {scale:.3g}: please report this, with the model's configuration"
        )
    return float(difference.max() / want.abs().max().clamp(min=tiny))
