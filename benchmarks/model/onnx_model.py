"""ONNX Runtime's side of benchmarks/model/generation.py: a model exported once with its key/value cache, quantized.

The export is transformers' own, with its fusions for ONNX Runtime's CPU provider (GroupQueryAttention among them), and
its head computes the wanted positions alone, as the torch models do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel

from lobcq_fx.frontends.output_types import CACHE_NAME

BLOCK = 32
ACCURACY_LEVEL = 4
"""Activations are quantized to int8 inside, the fastest. Level 0 leaves them in fp32."""

PAST, QUERY, KEPT = 5, 3, 2
"""Of the example that is exported: all different and above 1, so that none is baked in."""


def export_onnx(model: PreTrainedModel, path: Path) -> None:
    """One graph for prompts and for single tokens, batch 1, weights in a file beside it."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    cache = DynamicCache(config=model.config)
    model(torch.arange(PAST)[None], use_cache=True, **{CACHE_NAME: cache})
    inputs: dict[str, Any] = {
        "input_ids": torch.arange(QUERY)[None],
        "attention_mask": torch.ones(1, PAST + QUERY, dtype=torch.long),
        "position_ids": torch.arange(PAST, PAST + QUERY)[None],
        "logits_to_keep": torch.arange(QUERY - KEPT, QUERY),
    }
    shapes: dict[str, Any] = {name: {1: Dim.AUTO} for name in inputs}
    shapes["logits_to_keep"] = {0: Dim.AUTO}
    shapes[CACHE_NAME] = [{2: Dim.AUTO} for _ in range(2 * len(cache.layers))]
    inputs[CACHE_NAME] = cache
    exporter = OnnxExporter()
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions="cpu")
    program, _ = exporter.export_program(model, inputs, config)
    path.parent.mkdir(parents=True)
    exporter.save_program(program, path)


def quantize_onnx(source: Path, path: Path, accuracy_level: int = ACCURACY_LEVEL) -> None:
    """Every constant matmul, the head's among them, becomes MatMulNBits: 4 bits, symmetric, in blocks of 32."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=accuracy_level)
    quantizer = MatMulNBitsQuantizer(str(source), algo_config=config)
    quantizer.process()
    path.parent.mkdir(parents=True)
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)


class OnnxModel:
    """An exported model in a session; its cache stays in ONNX Runtime's own values, never copied."""

    def __init__(self, path: Path, threads: int, use_library: bool = False) -> None:
        import onnxruntime as ort

        self._value = ort.OrtValue.ortvalue_from_numpy
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if use_library:
            from lobcq_fx.export import register

            register(options)
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        shapes = [value.shape for value in self.session.get_inputs() if len(value.shape) == 4]
        self.empty = [self._value(np.zeros((1, s[1], 0, s[3]), dtype=np.float32)) for s in shapes]

    def prefill(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        """Logits [1, V] of the last position of ids [1, T], and the cache."""
        return self._run(ids, self.empty)

    def step(self, ids: Tensor, cache: list[Any]) -> tuple[Tensor, list[Any]]:
        """The same after some cached tokens. The cache that was passed stays as it is."""
        return self._run(ids, cache)

    def fork(self, cache: list[Any]) -> list[Any]:
        """The same cache: no step changes it."""
        return cache

    def _run(self, ids: Tensor, cache: list[Any]) -> tuple[Tensor, list[Any]]:
        query, past = ids.shape[1], cache[0].shape()[2]
        arrays = (
            ids.numpy(),
            np.ones((1, past + query), dtype=np.int64),
            np.arange(past, past + query)[None],
            np.array([query - 1]),
        )
        taken = len(self.inputs) - len(cache)  # ours has no logits_to_keep: its head computes the last position alone
        values = [*map(self._value, arrays[:taken]), *cache]
        logits, *grown = self.session.run_with_ort_values(self.outputs, dict(zip(self.inputs, values, strict=True)))
        return torch.from_numpy(logits.numpy())[:, -1], grown
