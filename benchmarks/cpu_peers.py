"""The linears that the CPU core is compared with: each a function of x [M, K] that multiplies by one fixed weight.

A peer quantizes the weight its own way; the benchmark checks that its product resembles the exact one, so that no
speed is printed for something that does not compute a linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

Linear = Callable[[Tensor], Tensor]

INT4_GROUP = 128
NBITS_BLOCK = 32


def torch_fp32(weight: Tensor, _threads: int) -> Linear:
    """`torch.nn.functional.linear` in fp32."""
    return lambda x: torch.nn.functional.linear(x, weight)


def torch_bf16(weight: Tensor, _threads: int) -> Linear:
    """`torch.nn.functional.linear` in bf16, input already bf16 as in a bf16 model."""
    half = weight.to(torch.bfloat16)
    inputs: dict[int, Tensor] = {}

    def run(x: Tensor) -> Tensor:
        if id(x) not in inputs:
            inputs.clear()
            inputs[id(x)] = x.to(torch.bfloat16)
        return torch.nn.functional.linear(inputs[id(x)], half)

    return run


def torch_int4pack(weight: Tensor, _threads: int) -> Linear:
    """`aten::_weight_int4pack_mm_for_cpu`: 4-bit weights in groups of 128, bf16 activations (its fastest)."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // INT4_GROUP, INT4_GROUP)
    scale = (groups.abs().amax(dim=2) / 7).clamp(min=1e-9)
    codes = (groups / scale.unsqueeze(2)).round().clamp(-8, 7).to(torch.int32).view(rows, columns) + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales_and_zeros = torch.stack((scale.t(), torch.zeros_like(scale.t())), dim=-1).to(torch.bfloat16).contiguous()

    def run(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.to(torch.bfloat16), packed, INT4_GROUP, scales_and_zeros
        )
        return out

    return run


def ort_fp32(weight: Tensor, threads: int) -> Linear:
    """ONNX Runtime's fp32 MatMul."""
    from onnx import TensorProto, helper, numpy_helper

    initializer = numpy_helper.from_array(weight.t().contiguous().numpy(), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return _session(node, [initializer], weight.shape, threads, TensorProto.FLOAT)


def ort_nbits(weight: Tensor, threads: int, accuracy_level: int = 4) -> Linear:
    """ONNX Runtime's MatMulNBits: 4-bit weights in blocks of 32, activations quantized to int8 inside (level 4)."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.shape
    blocks = weight.view(rows, columns // NBITS_BLOCK, NBITS_BLOCK)
    scale = (blocks.abs().amax(dim=2) / 7).clamp(min=1e-9)
    codes = ((blocks / scale.unsqueeze(2)).round().clamp(-8, 7) + 8).to(torch.uint8)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).numpy()
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=4,
        block_size=NBITS_BLOCK, accuracy_level=accuracy_level,
    )  # fmt: skip
    initializers = [
        numpy_helper.from_array(packed, "w"),
        numpy_helper.from_array(scale.flatten().numpy().astype(np.float32), "scales"),
    ]
    return _session(node, initializers, weight.shape, threads, TensorProto.FLOAT)


def torchao_int8(weight: Tensor, _threads: int) -> Linear:
    """torchao's int8 dynamic activation, int8 weight linear, eager."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return lambda x: model(x)


PEERS: dict[str, Callable[[Tensor, int], Linear]] = {
    "torch fp32": torch_fp32,
    "torch bf16": torch_bf16,
    "torch int4pack": torch_int4pack,
    "ORT fp32": ort_fp32,
    "ORT MatMulNBits 4": ort_nbits,
    "torchao int8 dynamic": torchao_int8,
}


def _session(node: NodeProto, initializers: list[TensorProto], shape: torch.Size, threads: int, element: int) -> Linear:
    import onnxruntime as ort
    from onnx import helper

    rows, columns = shape
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", element, ["M", columns])],
        [helper.make_tensor_value_info("y", element, ["M", rows])],
        initializers,
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
