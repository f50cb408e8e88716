"""OpenVINO's linear. Alone in this package this file imports openvino, inside its functions.

A copy of a weight is a compiled model, whose weights OpenVINO lays out for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lobcq_fx.benchmarking.contender import Call, Contender
from lobcq_fx.benchmarking.integers import OFFSET, codes_and_scales

if TYPE_CHECKING:
    from openvino import Model

PACKAGES = ("openvino",)

INT4_GROUP = 128
"""Of weights, and of the activations that are quantized to int8 inside: the same for both is its fastest."""


def openvino_int4(weight: Tensor, threads: int) -> Contender:
    """4-bit weights in groups of 128, int8 activations inside."""
    import openvino

    rows, columns = weight.shape
    codes, scales = codes_and_scales(weight, INT4_GROUP)
    half = scales.to(torch.float16)
    model, core = _linear(codes, half), openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": INT4_GROUP,
        # As many threads as asked for: on cores' second ones too, and wherever the others' run.
        "ENABLE_HYPER_THREADING": True,
        "ENABLE_CPU_PINNING": False,
    }

    def copy() -> Call:
        request = core.compile_model(model, "CPU", settings).create_infer_request()

        def call(x: openvino.Tensor) -> openvino.Tensor:
            request.set_input_tensor(x)
            request.infer()
            return request.get_output_tensor()

        return call

    return Contender(
        rows * columns // 2 + half.nbytes,
        copy,
        accept=lambda x: openvino.Tensor(x.numpy(), shared_memory=True),
        product=lambda result: torch.from_numpy(result.data.copy()),
    )


def _linear(codes: Tensor, scales: Tensor) -> Model:
    """What its CPU plugin knows as a compressed weight: i4 to fp16, times scales, fp16 [N, K / group], to fp32."""
    import openvino
    from openvino import opset15

    (rows, columns), groups = codes.shape, scales.shape[1]
    grouped = (rows, groups, columns // groups)
    signed = (codes - OFFSET).to(torch.int8).flatten() & 15
    tensor = openvino.Tensor(openvino.Type.i4, grouped)  # owns its memory, unlike one made of an array
    tensor.data.reshape(-1).view("uint8")[:] = (signed[0::2] | signed[1::2] << 4).view(torch.uint8).numpy()
    x = opset15.parameter([-1, columns], openvino.Type.f32)
    scaled = opset15.multiply(opset15.convert(opset15.constant(tensor), "f16"), scales.view(rows, groups, 1).numpy())
    decoded = opset15.convert(opset15.reshape(scaled, [rows, columns], special_zero=False), "f32")
    product = opset15.matmul(x, decoded, transpose_a=False, transpose_b=True)
    return openvino.Model([product], [x], "linear")
