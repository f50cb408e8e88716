"""Exported models run in ONNX Runtime, with torch tensors in and out."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from lobcq_fx.export import register
from lobcq_fx.export.metadata import MODEL

ENCODED = ("codes", "selectors", "scales", "tensor_scale")


class Session:
    """A session on a folder, the graph's own kernels or the op library's for our operators."""

    def __init__(self, folder: Path, *, use_library: bool = False, model: str = MODEL) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        if use_library:
            register(options)
        self.inner = ort.InferenceSession(str(folder / model), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value.shape for value in self.inner.get_inputs()}
        self.outputs = [value.name for value in self.inner.get_outputs()]

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name. Caches that are not given are empty; inputs that the graph does not take are dropped."""
        batch = next(iter(inputs.values())).shape[0]
        feeds = {
            name: np.zeros((batch, shape[1], 0, shape[3]), np.float32)
            for name, shape in self.inputs.items()
            if name.startswith("past_key_values")
        }
        feeds |= {name: tensor.numpy() for name, tensor in inputs.items() if name in self.inputs}
        results = self.inner.run_with_ort_values(
            self.outputs, {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        )
        return {name: _tensor(value) for name, value in zip(self.outputs, results, strict=True)}


def encoded_activations(folder: Path, *, use_library: bool, **inputs: Tensor) -> list[Tensor]:
    """All that every QuantizeActivation of the graph gives, in the graph's order."""
    proto = onnx.load(str(folder / MODEL), load_external_data=False)
    names = [name for node in proto.graph.node if node.op_type == "QuantizeActivation" for name in node.output]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    onnx.save(proto, str(folder / "encoded.onnx"))
    found = Session(folder, use_library=use_library, model="encoded.onnx")(**inputs)
    return [found[name] for name in names]


def _tensor(value: ort.OrtValue) -> Tensor:
    """numpy has no E4M3: its bytes are read as what they are, bytes."""
    if value.data_type() != "tensor(float8e4m3fn)":
        return torch.from_numpy(value.numpy())
    tensor = torch.empty(value.shape(), dtype=torch.uint8)
    ctypes.memmove(tensor.data_ptr(), value.data_ptr(), tensor.numel())
    return tensor
