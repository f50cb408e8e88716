"""What transformers' OnnxExporter knows about converting Hugging Face models, for graphs that are traced already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx
from transformers.exporters import exporter_onnx
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime
from transformers.exporters.utils import apply_fx_node_fixes, apply_patches, register_patch


@contextmanager
def conversion_fixes(graph_module: fx.GraphModule) -> Iterator[dict[Any, Any]]:
    """Rewrite nodes that ONNX cannot express, again after torch's decompositions; yield translations of more ops."""
    with apply_patches("onnx"):
        apply_fx_node_fixes("onnx", graph_module)
        yield dict(exporter_onnx._ONNX_TRANSLATION_TABLE)


def extend_onnx_exporter(translations: Mapping[Any, Any], finish: Callable[[Any], None]) -> None:
    """Let OnnxExporter translate more ops, and call `finish` with each ONNX model that it makes. Once a process."""
    exporter_onnx._ONNX_TRANSLATION_TABLE.update(translations)

    def patch(export: Callable[..., Any]) -> Callable[..., Any]:
        def export_and_finish(*args: Any, **kwargs: Any) -> Any:
            onnx_program = export(*args, **kwargs)
            finish(onnx_program.model)
            return onnx_program

        return export_and_finish

    register_patch("onnx", "torch.onnx.export")(patch)


def fix_onnx_program(onnx_program: Any) -> None:
    """Rewrite what ONNX Runtime refuses."""
    exporter_onnx.apply_onnx_ir_fixes(onnx_program)


def fuse_for_cpu(model: Any) -> None:
    """Put ONNX Runtime's own norms, activations and rotary embeddings in place of what they compute."""
    fuse_for_onnxruntime(model, "cpu")
