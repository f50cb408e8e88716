"""Binds the C++ core to the `lobcq::` ops for CPU tensors.

`lobcq::linear_prepacked`, the op of models that run, is the core's own, from the dispatcher straight into C++. The ops
on weights as they are stored encode and decode by the core, and multiply by torch: their results are those of the
default implementations, bit for bit. Without a built core, or with LOBCQ_CPU_CORE=0 in the environment, the defaults
stay in place.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import lobcq_fx.ops  # noqa: F401  (defines the schemas that are implemented here)
from lobcq_fx.format import FormatSpec, scale_product
from lobcq_fx.kernels.cpu.installed import cpu_core, tables_of
from lobcq_fx.kernels.cpu.library import Core
from lobcq_fx.kernels.cpu.operands import PackedOperand
from lobcq_fx.kernels.cpu.weight_layout import CpuWeightLayout
from lobcq_fx.ops.schemas import LINEAR, LINEAR_FLOAT_ACTIVATION, QUANTIZE_ACTIVATION, QUANTIZE_WEIGHT


def weight_layout(device: torch.device) -> CpuWeightLayout | None:
    """The layout in which the kernels for a device want weights; None where the ops read them as they are stored."""
    return CpuWeightLayout() if device.type == "cpu" and bind_cpu_core() else None


@cache
def bind_cpu_core() -> bool:
    """Register the core's implementations, once a process; returns whether there is a core to register."""
    core = cpu_core()
    if core is None:
        return False
    core.register_torch_ops()
    torch.library.impl(QUANTIZE_ACTIVATION, "CPU", _quantize_activation)
    torch.library.impl(QUANTIZE_WEIGHT, "CPU", _quantize_weight)
    torch.library.impl(LINEAR, "CPU", _linear)
    torch.library.impl(LINEAR_FLOAT_ACTIVATION, "CPU", _linear_float_activation)
    return True


def _quantize_activation(
    x: Tensor, codebooks: Tensor, array_size: int, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    core, leading = _core(), x.shape[:-1]
    rows = x.detach().reshape(leading.numel(), x.shape[-1]).contiguous()
    scale = None if static_scale is None else static_scale.float().view(1, 1).repeat(rows.shape[0], 1)
    packed = core.encode(tables_of(codebooks), rows, array_size, scale)
    scales = packed.scales.view(torch.float8_e4m3fn)
    parts = (packed.codes, packed.selectors, scales, packed.tensor_scale)
    codes, selectors, scales, tensor_scale = (part.view(*leading, part.shape[1]) for part in parts)
    return codes, selectors, scales, tensor_scale


def _quantize_weight(w: Tensor, codebooks: Tensor, array_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    core, rows = _core(), w.detach().contiguous()
    packed = core.encode(tables_of(codebooks), rows, array_size, core.tensor_scale(rows))
    return packed.codes, packed.selectors, packed.scales.view(torch.float8_e4m3fn), packed.tensor_scale


def _linear(
    codes: Tensor,
    selectors: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    codebooks: Tensor,
    w_codes: Tensor,
    w_selectors: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor,
    w_codebooks: Tensor,
    bias: Tensor | None,
    in_features: int,
    array_size: int,
    dtype: torch.dtype,
) -> Tensor:
    leading = codes.shape[:-1]
    a = _scaled_entries(codes, selectors, scales, codebooks, in_features, array_size)
    w = _scaled_entries(w_codes, w_selectors, w_scales, w_codebooks, in_features, array_size)
    out = scale_product(a @ w.t(), tensor_scale.reshape(-1, 1), w_tensor_scale, bias)
    return out.to(dtype).view(*leading, w_codes.shape[0])


def _linear_float_activation(
    x: Tensor,
    w_codes: Tensor,
    w_selectors: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor,
    w_codebooks: Tensor,
    bias: Tensor | None,
    array_size: int,
) -> Tensor:
    w = _scaled_entries(w_codes, w_selectors, w_scales, w_codebooks, x.shape[-1], array_size) * w_tensor_scale
    return torch.nn.functional.linear(x.float(), w, None if bias is None else bias.float()).to(x.dtype)


def _scaled_entries(
    codes: Tensor, selectors: Tensor, scales: Tensor, codebooks: Tensor, columns: int, array_size: int
) -> Tensor:
    """Entry times block-array scale, fp32 [R, K], of an operand with any leading dimensions."""
    rows = codes.shape[:-1].numel()
    packed = PackedOperand(
        codes.reshape(rows, codes.shape[-1]).contiguous(),
        selectors.reshape(rows, selectors.shape[-1]).contiguous(),
        scales.view(torch.uint8).reshape(rows, scales.shape[-1]).contiguous(),
        torch.ones(()),
        FormatSpec(codebooks.shape[0], array_size),
        columns,
    )
    return _core().decode(tables_of(codebooks), packed)


def _core() -> Core:
    core = cpu_core()
    assert core is not None, "bound without a core"
    return core
