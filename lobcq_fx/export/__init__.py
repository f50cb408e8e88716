"""ONNX export: one file that stock ONNX Runtime opens, and the op library that makes it fast.

Alone in this package, this part imports onnx, onnxscript and onnxruntime, and only once something is exported.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lobcq_fx.errors import ExportError
from lobcq_fx.export.library import get_library_path, register
from lobcq_fx.model import QuantizedModel
from lobcq_fx.tracing.autocast import no_autocast

if TYPE_CHECKING:
    from lobcq_fx.export.folder import ExportSummary
    from lobcq_fx.export.runtime import OnnxCausalLM
    from lobcq_fx.export.transformers_quantizer import LobcqQuantizer

__all__ = ["LobcqQuantizer", "OnnxCausalLM", "export_onnx", "get_library_path", "register"]

NEEDED = {"onnx": "1.21", "onnxscript": "0.7", "onnxruntime": "1.20", "transformers": "5.23"}
"""Packages and their oldest versions."""

NEEDED_BY_TARGET = {"matmulnbits": {"onnxruntime": "1.23"}}
"""The CPU's MatMulNBits takes 8 bits from then on."""

_HOMES = {"LobcqQuantizer": "transformers_quantizer", "OnnxCausalLM": "runtime"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_packages()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


@no_autocast()
def export_onnx(
    q: QuantizedModel,
    out: str | Path,
    example_inputs: Any = None,
    *,
    target: Literal["custom", "matmulnbits"] = "custom",
    fuse: bool = True,
    last_logits_only: bool = False,
    tokenizer: Any = None,
    include_library: bool = False,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> ExportSummary:
    """Write a folder with `model.onnx`, and run it once against the torch model.

    What is not quantized computes in fp32, whatever the model's dtype. A causal language model's folder also gets its
    configuration and, where onnxruntime-genai can serve it, `genai_config.json`.

    Args:
        q: from `quantize` or `load`, on the CPU.
        out: new, empty, or a folder written by this function, which is replaced as a whole.
        example_inputs: one call's inputs, for models that are no language model and do not take input_ids: a tensor, a
            tuple, or a dict by name.
        target: "custom" keeps weights and activations in 4 bits, in the operators of docs/onnx.md. "matmulnbits" writes
            weights as 8-bit com.microsoft::MatMulNBits and leaves the activations in float.
        fuse: put ONNX Runtime's own attention, norms and rotary embedding in place of what they compute. Such a graph
            needs ONNX Runtime 1.22, and takes several tokens after a cache for a batch of one only.
        last_logits_only: a language model returns logits [B, 1, V], of the last position, which is all that generation
            reads: a long prompt then costs no head for the others.
        tokenizer: saved beside the model if given; onnxruntime-genai wants one.
        include_library: put the op library into the folder and name it in `genai_config.json`.
        progress: called with (step, done, total) as the work goes on.

    Returns:
        What was written: the graph's nodes by type, its size, the largest difference to torch.

    Raises:
        ExportError: a package is missing, the model cannot be exported, or the exported one computes something else.
        CheckpointError: `out` holds something else. In either case nothing is left behind.
    """
    check_packages(NEEDED | NEEDED_BY_TARGET.get(target, {}))
    from lobcq_fx.export.folder import write_folder

    return write_folder(
        q,
        Path(out),
        example_inputs,
        target=target,
        fuse=fuse,
        last_logits_only=last_logits_only,
        tokenizer=tokenizer,
        include_library=include_library,
        progress=progress or (lambda step, done, total: None),
    )


def check_packages(needed: Mapping[str, str] = NEEDED) -> None:
    """Refuse an environment without what exporting needs.

    Args:
        needed: packages and their oldest versions.

    Raises:
        ExportError: names the package and the command that installs it.
    """
    for package, oldest in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ExportError(f'ONNX export needs {package}: pip install "lobcq-fx[onnx]"')
        # Not its distribution's: onnxruntime comes in several, under other names.
        version = importlib.import_module(package).__version__
        if _parsed(version) < _parsed(oldest):
            raise ExportError(f'ONNX export needs {package} {oldest}, this is {version}: pip install "lobcq-fx[onnx]"')


def _parsed(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
