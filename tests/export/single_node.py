"""Models of one node: an operator with its function body, every input a graph input."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from lobcq_fx.export.functions import function_body
from lobcq_fx.export.functions.body import OPSET
from lobcq_fx.export.schemas import DOMAIN, SCHEMAS, VERSION

KINDS = {
    "tensor(uint8)": ir.DataType.UINT8,
    "tensor(int8)": ir.DataType.INT8,
    "tensor(int32)": ir.DataType.INT32,
    "tensor(int64)": ir.DataType.INT64,
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(float8e4m3fn)": ir.DataType.FLOAT8E4M3FN,
}
TORCH = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}
NUMPY = (ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64)
"""What numpy has; E4M3 and narrow floats travel as fp32, exactly, and are cast next to the node."""


sums_empty_tensors = pytest.mark.skipif(
    tuple(int(part) for part in ort.__version__.split(".")[:2]) < (1, 31),
    reason="before 1.31, ONNX Runtime gives sums of empty tensors another shape",
)


class Operator:
    """An operator in ONNX Runtime, run on torch tensors. A session is made for each rank of the inputs."""

    def __init__(self, name: str, x_type: torch.dtype = torch.float32, **attributes: int) -> None:
        self.schema = SCHEMAS[name]
        self.kinds = {**KINDS, "T": TORCH[x_type]}
        self.attributes = attributes
        if "activation_array_size" in self.schema.attributes:
            self.attributes.setdefault("activation_array_size", attributes["array_size"])
        self.sessions: dict[tuple[int | None, ...], ort.InferenceSession] = {}

    def __call__(self, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
        """What ONNX Runtime computes; None, or an input not given, is left out."""
        padded = [*tensors, *[None] * (len(self.schema.inputs) - len(tensors))]
        ranks = tuple(None if tensor is None else tensor.dim() for tensor in padded)
        if ranks not in self.sessions:
            self.sessions[ranks] = self._session(ranks)
        arrays = {
            parameter.name: (tensor.float() if tensor.dtype.is_floating_point else tensor).numpy()
            for parameter, tensor in zip(self.schema.inputs, padded, strict=True)
            if tensor is not None
        }
        return [torch.from_numpy(np.array(output)) for output in self.sessions[ranks].run(None, arrays)]

    def _session(self, ranks: tuple[int | None, ...]) -> ort.InferenceSession:
        inputs, operands, nodes, outputs = [], [], [], []
        for parameter, rank in zip(self.schema.inputs, ranks, strict=True):
            if rank is None:
                operands.append(None)
                continue
            kind = self.kinds[parameter.type_str]
            value = _value(parameter.name, kind if kind in NUMPY else ir.DataType.FLOAT, rank)
            inputs.append(value)
            operands.append(value if kind in NUMPY else _cast(nodes, value, kind, rank))
        node = ir.Node(
            DOMAIN,
            self.schema.name,
            operands,
            attributes=ir.convenience.convert_attributes(self.attributes),
            outputs=[_value(p.name, self.kinds[p.type_str], ranks[0]) for p in self.schema.outputs],
        )
        nodes.append(node)
        for value in node.outputs:
            outputs.append(value if value.dtype in NUMPY else _cast(nodes, value, ir.DataType.FLOAT, ranks[0]))
        graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": OPSET, DOMAIN: VERSION}, name="one")
        proto = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function_body(self.schema.name)]))
        onnx.checker.check_model(proto, full_check=True)
        return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def _value(name: str, kind: ir.DataType, rank: int | None) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([None] * (rank or 0)))


def _cast(nodes: list[ir.Node], value: ir.Value, kind: ir.DataType, rank: int | None) -> ir.Value:
    output = _value(f"{value.name}_cast", kind, rank)
    attributes = [ir.Attr("to", ir.AttributeType.INT, int(kind))]
    nodes.append(ir.Node("", "Cast", [value], attributes=attributes, outputs=[output]))
    return output
