"""Binds kernels to the `lobcq::` ops: the C++ core for CPU tensors, Triton's for CUDA tensors.

The ops that every step of a model calls, `lobcq::linear_prepacked`, `lobcq::quantize_states` and `lobcq::attention`,
are the core's own, from the dispatcher straight into C++. The ops on weights as they are stored encode and decode by
the core, and multiply by torch: their results are those of the default implementations, bit for bit. Without a built
core, or with LOBCQ_CPU_CORE=0 in the environment, the defaults stay in place.

On CUDA tensors all of them run Triton kernels where LOBCQ_TRITON=1 asks for those, which no GPU has run yet; otherwise,
without Triton, or on a GPU that lacks their instructions, the defaults.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache, partial, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import lobcq_fx.ops  # noqa: F401  (defines the schemas that are implemented here)
from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.cpu.installed import cpu_core, tables_of
from lobcq_fx.kernels.cpu.library import Core
from lobcq_fx.kernels.cpu.operands import PackedOperand
from lobcq_fx.kernels.cpu.weight_layout import CpuWeightLayout
from lobcq_fx.kernels.triton.weight_layout import CudaWeightLayout
from lobcq_fx.ops import schemas
from lobcq_fx.ops.grouped_linear import StoredGroupedLinears
from lobcq_fx.ops.linear import StoredLinears
from lobcq_fx.ops.operand_checks import check, check_whole_arrays
from lobcq_fx.ops.states import decode_states

logger = logging.getLogger(__name__)

TRITON_SWITCH = "LOBCQ_TRITON"
"""Environment variable: "1" binds the Triton kernels. Becomes the default once a GPU has run their tests."""

LEAST_CAPABILITY = (8, 0)
"""Ampere: the first GPUs with bf16 MMA instructions and asynchronous copies to shared memory."""


def attends(device: torch.device) -> bool:
    """Whether the device has a kernel for `lobcq::attention`: the default one decodes all keys and values at once."""
    return device.type == "cpu" and bind_cpu_core()


def weight_layout(device: torch.device) -> CpuWeightLayout | CudaWeightLayout | None:
    """The layout in which the kernels for a device want weights; None where the ops read them as they are stored."""
    if device.type == "cpu" and bind_cpu_core():
        return CpuWeightLayout()
    if device.type == "cuda" and bind_triton_kernels():
        return CudaWeightLayout()
    return None


@cache
def bind_cpu_core() -> bool:
    """Register the core's implementations, once a process; returns whether there is a core to register."""
    core = cpu_core()
    if core is None:
        return False
    core.register_torch_ops()
    torch.library.impl(schemas.QUANTIZE_ACTIVATION, "CPU", _quantize_activation)
    torch.library.impl(schemas.QUANTIZE_ACTIVATION_INT8, "CPU", _quantize_activation_int8)
    torch.library.impl(schemas.ROTATE, "CPU", _rotate)
    torch.library.impl(schemas.QUANTIZE_WEIGHT, "CPU", _quantize_weight)
    torch.library.impl(schemas.QUANTIZE_WEIGHT_SEARCHED, "CPU", _quantize_weight_searched)
    torch.library.impl(schemas.DEQUANTIZE_WEIGHT, "CPU", _dequantize_weight)
    torch.library.impl(schemas.WEIGHT_SQUARES, "CPU", _weight_squares)
    torch.library.impl(schemas.COMPENSATE, "CPU", _compensate)
    torch.library.impl(schemas.DEQUANTIZE_STATES, "CPU", partial(decode_states, _decoded))
    stored = StoredLinears(_scaled_entries)
    torch.library.impl(schemas.LINEAR, "CPU", stored.linear)
    torch.library.impl(schemas.LINEAR_INT8_ACTIVATION, "CPU", stored.linear_int8_activation)
    torch.library.impl(schemas.LINEAR_FLOAT_ACTIVATION, "CPU", stored.linear_float_activation)
    grouped = StoredGroupedLinears(_scaled_entries)
    torch.library.impl(schemas.GROUPED_LINEAR, "CPU", grouped.grouped_linear)
    torch.library.impl(schemas.GROUPED_LINEAR_INT8_ACTIVATION, "CPU", grouped.grouped_linear_int8_activation)
    torch.library.impl(schemas.GROUPED_LINEAR_FLOAT_ACTIVATION, "CPU", grouped.grouped_linear_float_activation)
    return True


@cache
def bind_triton_kernels() -> bool:
    """Register the Triton kernels, once a process; returns whether every GPU here can run them, and logs why not."""
    reason = _why_no_triton()
    if reason:
        logger.warning("%s, the ops on CUDA tensors run through plain torch", reason)
        return False
    from lobcq_fx.kernels.triton.torch_ops import IMPLEMENTATIONS  # imports triton

    for name, implementation in IMPLEMENTATIONS.items():
        torch.library.impl(name, "CUDA", _on_its_device(implementation))
    return True


def rows_to_warm(device: torch.device, most: int) -> list[int]:
    """For how many rows of an activation, up to `most`, a device's kernels have to run once until all are compiled."""
    if device.type != "cuda" or not bind_triton_kernels():
        return []
    from lobcq_fx.kernels.triton.configs import rows_to_warm as triton_rows  # imports triton

    return triton_rows(most)


def _why_no_triton() -> str | None:
    if os.environ.get(TRITON_SWITCH) != "1":
        return f"{TRITON_SWITCH} is not 1"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < LEAST_CAPABILITY:
            name = torch.cuda.get_device_name(index)
            return f"{name} has compute capability {'.'.join(map(str, capability))}, the kernels need 8.0"
    return None


def _on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: make it the first operand's."""

    @wraps(implementation)
    def run(first: Tensor, *rest: Any, **options: Any) -> Any:
        with torch.cuda.device_of(first):
            return implementation(first, *rest, **options)

    return run


def _quantize_activation(
    x: Tensor, codebooks: Tensor, array_size: int, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(schemas.QUANTIZE_ACTIVATION, locals())
    rows = _rows(x)
    packed = _core().encode(tables_of(codebooks), rows, array_size, _row_scales(static_scale, rows))
    scales = packed.scales.view(torch.float8_e4m3fn)
    parts = (packed.codes, packed.selectors, scales, packed.tensor_scale)
    codes, selectors, scales, tensor_scale = (part.view(*x.shape[:-1], part.shape[1]) for part in parts)
    return codes, selectors, scales, tensor_scale


def _quantize_activation_int8(
    x: Tensor, array_size: int, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check(schemas.QUANTIZE_ACTIVATION_INT8, locals())
    rows = _rows(x)
    operand = _core().encode_int8(rows, array_size, _row_scales(static_scale, rows))
    parts = (operand.entries, operand.scales.view(torch.float8_e4m3fn), operand.tensor_scale)
    entries, scales, tensor_scale = (part.view(*x.shape[:-1], part.shape[1]) for part in parts)
    return entries, scales, tensor_scale


def _rotate(x: Tensor, array_size: int) -> Tensor:
    check(schemas.ROTATE, locals())
    check_whole_arrays(schemas.ROTATE, "x", x, array_size)
    return _core().rotate(_rows(x), array_size).view(x.shape)


def _rows(x: Tensor) -> Tensor:
    """An activation [..., K] as the core takes it, [R, K]."""
    return x.detach().reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _row_scales(static_scale: Tensor | None, rows: Tensor) -> Tensor | None:
    """A static scale for each row: the rule that makes NaN of a whole row with NaN or infinity in it."""
    return None if static_scale is None else static_scale.view(1, 1).repeat(rows.shape[0], 1)


def _quantize_weight(w: Tensor, codebooks: Tensor, array_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(schemas.QUANTIZE_WEIGHT, locals())
    core, rows = _core(), w.detach().contiguous()
    return _parts(core.encode(tables_of(codebooks), rows, array_size, core.tensor_scale(rows)))


def _quantize_weight_searched(w: Tensor, codebooks: Tensor, array_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(schemas.QUANTIZE_WEIGHT_SEARCHED, locals())
    core, rows = _core(), w.detach().contiguous()
    return _parts(core.encode_searched(tables_of(codebooks), rows, array_size, core.tensor_scale(rows)))


def _parts(packed: PackedOperand) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return packed.codes, packed.selectors, packed.scales.view(torch.float8_e4m3fn), packed.tensor_scale


def _dequantize_weight(
    w_codes: Tensor,
    w_selectors: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor,
    w_codebooks: Tensor,
    in_features: int,
    array_size: int,
) -> Tensor:
    check(schemas.DEQUANTIZE_WEIGHT, locals())
    return _decoded(w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, in_features, array_size)


def _weight_squares(
    w: Tensor,
    w_codes: Tensor,
    w_selectors: Tensor,
    w_scales: Tensor,
    w_tensor_scale: Tensor,
    w_codebooks: Tensor,
    array_size: int,
) -> Tensor:
    check(schemas.WEIGHT_SQUARES, locals())
    packed = _operand(w_codes, w_selectors, w_scales, w_tensor_scale, w_codebooks, w.shape[1], array_size)
    return _core().squares(tables_of(w_codebooks), w.detach().contiguous(), packed)


def _compensate(
    weight: Tensor,
    other_errors: Tensor,
    coupling: Tensor,
    power: Tensor,
    tensor_scale: Tensor,
    codebooks: Tensor,
    array_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(schemas.COMPENSATE, locals())
    check_whole_arrays(schemas.COMPENSATE, "weight", weight, array_size)
    operands = (weight.detach(), other_errors, coupling, power, float(tensor_scale), array_size)
    codes, selectors, scales, costs = _core().compensate(tables_of(codebooks), *operands)
    return codes, selectors, scales.view(torch.float8_e4m3fn), costs


def _scaled_entries(
    codes: Tensor, selectors: Tensor, scales: Tensor, codebooks: Tensor, columns: int, array_size: int
) -> Tensor:
    """Entry times block-array scale, fp32 [R, K], of an operand with any leading dimensions."""
    one = torch.ones((), dtype=torch.float32, device="cpu")
    return _decoded(codes, selectors, scales, one, codebooks, columns, array_size)


def _decoded(
    codes: Tensor, selectors: Tensor, scales: Tensor, tensor_scale: Tensor, codebooks: Tensor, columns: int,
    array_size: int,
) -> Tensor:  # fmt: skip
    packed = _operand(codes, selectors, scales, tensor_scale, codebooks, columns, array_size)
    return _core().decode(tables_of(codebooks), packed)


def _operand(
    codes: Tensor, selectors: Tensor, scales: Tensor, tensor_scale: Tensor, codebooks: Tensor, columns: int,
    array_size: int,
) -> PackedOperand:  # fmt: skip
    """What is stored of an operand with any leading dimensions, as the core takes it."""
    rows = codes.shape[:-1].numel()
    return PackedOperand(
        codes.reshape(rows, codes.shape[-1]).contiguous(),
        selectors.reshape(rows, selectors.shape[-1]).contiguous(),
        scales.view(torch.uint8).reshape(rows, scales.shape[-1]).contiguous(),
        tensor_scale,
        FormatSpec(codebooks.shape[0], array_size),
        columns,
    )


def _core() -> Core:
    core = cpu_core()
    assert core is not None, "bound without a core"
    return core
