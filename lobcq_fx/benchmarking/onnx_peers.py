"""ONNX Runtime's linears. Alone in this package this file imports onnx and onnxruntime, inside its functions.

A copy of a weight is a session. All sessions of the process share one thread pool, as the layers of one model do: with
a pool each, every call would have to wake threads that sleep.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lobcq_fx.benchmarking.contender import Call, Contender
from lobcq_fx.benchmarking.integers import codes_and_scales

if TYPE_CHECKING:
    from onnx import NodeProto

PACKAGES = ("onnx", "onnxruntime")

INT4_BLOCK = 32
INT8_ACTIVATIONS = 4
"""`accuracy_level` of MatMulNBits: it quantizes the activations to int8, its fastest."""

FATAL = 4
"""Log severity: errors reach us as exceptions."""


def ort_fp32(weight: Tensor, threads: int) -> Contender:
    """MatMul in fp32."""
    from onnx import helper

    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return _contender(node, {"w": weight.t().contiguous()}, weight.shape, threads)


def ort_int4(weight: Tensor, threads: int) -> Contender:
    """MatMulNBits: 4-bit weights in blocks of 32, int8 activations inside."""
    from onnx import helper

    rows, columns = weight.shape
    codes, scales = codes_and_scales(weight, INT4_BLOCK)
    blocks = codes.to(torch.uint8).view(rows, columns // INT4_BLOCK, INT4_BLOCK)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=4,
        block_size=INT4_BLOCK, accuracy_level=INT8_ACTIVATIONS,
    )  # fmt: skip
    initializers = {"w": blocks[..., 0::2] | blocks[..., 1::2] << 4, "scales": scales.flatten()}
    return _contender(node, initializers, weight.shape, threads)


def _contender(node: NodeProto, initializers: dict[str, Tensor], shape: torch.Size, threads: int) -> Contender:
    from onnx import TensorProto, helper, numpy_helper

    (rows, columns), element = shape, TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", element, ["M", columns])],
        [helper.make_tensor_value_info("y", element, ["M", rows])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in initializers.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    return Contender(
        sum(tensor.nbytes for tensor in initializers.values()),
        lambda: _session(model, threads),
        accept=lambda x: x.numpy(),
        product=lambda results: torch.from_numpy(results[0]),
    )


def _session(model: bytes, threads: int) -> Call:
    import onnxruntime

    _share_a_pool(threads)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = FATAL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})


@cache
def _share_a_pool(threads: int) -> None:
    """Set the size of the process's pool; onnxruntime refuses a second size, with an exception that says so."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)
