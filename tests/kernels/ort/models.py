"""ONNX models of a node or two, run in ONNX Runtime with torch tensors in and out, bytes untouched."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from lobcq_fx.export.schemas import SCHEMAS
from lobcq_fx.format import Encoded

ELEMENT_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
}
_DTYPES = {element_type: dtype for dtype, element_type in ELEMENT_TYPES.items()}
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.float32, 8: torch.int64}
"""What numpy, which lacks half of the dtypes, holds an element's bytes as."""

ENCODED = ("codes", "selectors", "scales", "tensor_scale")
IN_INT8 = ("entries", "scales", "tensor_scale")


@dataclass
class Model:
    """A graph under construction: add what it has, then `save` or `session`.

    Inputs and outputs have no static shapes, so that nothing but the ops looks at them.
    """

    inputs: dict[str, torch.dtype] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def node(self, op: str, inputs: list[str], outputs: list[str], **attributes: int) -> None:
        domain = "lobcq" if op in SCHEMAS else ""
        name = f"{op}_{sum(node.op_type == op for node in self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))

    def proto(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], None) for name, dtype in self.inputs.items()],
            [onnx.ValueInfoProto(name=name) for name in self.outputs],
            [_proto(name, tensor) for name, tensor in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("lobcq", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def session(self, library: Path, threads: int = 1) -> Session:
        return Session(self.proto().SerializeToString(), library, threads)


class Session:
    """A session of ONNX Runtime with the op library."""

    def __init__(self, model: bytes | str, library: Path, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised as well
        options.register_custom_ops_library(str(library))
        self.inner = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.inner.get_outputs()]

    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        values = {name: _value(tensor.contiguous()) for name, tensor in inputs.items()}
        results = self.inner.run_with_ort_values(self.outputs, values)
        return {name: _tensor(value) for name, value in zip(self.outputs, results, strict=True)}


def quantize_model(x: torch.dtype, codebooks: Tensor, array_size: int, scale: Tensor | None = None) -> Model:
    """x -> the four parts of an encoded activation."""
    model = Model({"x": x}, {"codebooks": codebooks}, outputs=list(ENCODED))
    model.node("QuantizeActivation", ["x", "codebooks"], list(ENCODED), array_size=array_size)
    if scale is not None:
        model.constants["static_scale"] = scale
        model.nodes[-1].input.append("static_scale")
    return model


def int8_quantize_model(x: torch.dtype, array_size: int, scale: Tensor | None = None) -> Model:
    """x -> the three parts of an activation in int8."""
    model = Model({"x": x}, {} if scale is None else {"static_scale": scale}, outputs=list(IN_INT8))
    model.node("QuantizeActivationInt8", ["x", *model.constants], list(IN_INT8), array_size=array_size)
    return model


def int8_model(w: Encoded, bias: Tensor | None = None) -> Model:
    """x -> QuantizeActivationInt8 -> LinearInt8Activation -> y."""
    model = int8_quantize_model(torch.float32, w.spec.array_size)
    model.outputs = ["y"]
    return _with_linear(model, "LinearInt8Activation", [*IN_INT8], w, bias, in_features=w.columns)


def linear_model(w: Encoded, bias: Tensor | None = None) -> Model:
    """x -> QuantizeActivation -> Linear -> y, everything but x constant."""
    model = quantize_model(torch.float32, w.codebooks, w.spec.array_size)
    model.outputs = ["y"]
    return _with_linear(model, "Linear", [*ENCODED, "codebooks"], w, bias, in_features=w.columns)


def float_model(w: Encoded, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Model:
    """x -> LinearFloatActivation -> y."""
    return _with_linear(Model({"x": dtype}, outputs=["y"]), "LinearFloatActivation", ["x"], w, bias)


def _with_linear(model: Model, op: str, inputs: list[str], w: Encoded, bias: Tensor | None, **attributes: int) -> Model:
    parts = weight_parts(w) | ({} if bias is None else {"bias": bias})
    model.constants |= parts
    model.node(op, [*inputs, *parts], ["y"], array_size=w.spec.array_size, **attributes)
    return model


def weight_parts(w: Encoded) -> dict[str, Tensor]:
    """The inputs of a linear that hold its weight."""
    parts = {"codes": w.codes, "selectors": w.selectors, "scales": w.scales, "tensor_scale": w.tensor_scale}
    return {f"w_{name}": tensor for name, tensor in (parts | {"codebooks": w.codebooks}).items()}


def _proto(name: str, tensor: Tensor) -> TensorProto:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return helper.make_tensor(name, ELEMENT_TYPES[tensor.dtype], list(tensor.shape), raw, raw=True)


def _value(tensor: Tensor) -> onnxruntime.OrtValue:
    carried = tensor.reshape(-1).view(_CARRIERS[tensor.element_size()]).view(tensor.shape)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(carried.numpy(), ELEMENT_TYPES[tensor.dtype])


def _tensor(value: onnxruntime.OrtValue) -> Tensor:
    tensor = torch.empty(value.shape(), dtype=_DTYPES[value.element_type()])
    if tensor.numel():
        ctypes.memmove(tensor.data_ptr(), value.data_ptr(), tensor.numel() * tensor.element_size())
    return tensor
