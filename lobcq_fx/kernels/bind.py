"""Binds the C++ core to the `lobcq::` ops for CPU tensors.

The core encodes and decodes; the product stays torch's. Results are therefore those of the default implementations, bit
for bit. Without a built core, or with LOBCQ_CPU_CORE=0 in the environment, the defaults stay in place.
"""

from __future__ import annotations

import logging
import os
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, check_codebooks, scale_product
from lobcq_fx.kernels.cpu import library
from lobcq_fx.kernels.cpu.library import Core, PackedOperand, Tables
from lobcq_fx.ops.schemas import LINEAR, LINEAR_FLOAT_ACTIVATION, QUANTIZE_ACTIVATION

logger = logging.getLogger(__name__)

SWITCH = "LOBCQ_CPU_CORE"


@cache
def bind_cpu_core() -> bool:
    """Register the core's implementations, once a process; returns whether there is a core to register."""
    if os.environ.get(SWITCH) == "0" or cpu_core() is None:
        return False
    torch.library.impl(QUANTIZE_ACTIVATION, "CPU", _quantize_activation)
    torch.library.impl(LINEAR, "CPU", _linear)
    torch.library.impl(LINEAR_FLOAT_ACTIVATION, "CPU", _linear_float_activation)
    return True


@cache
def cpu_core() -> Core | None:
    """The core that was built when the package was installed, or None."""
    built = sorted(Path(library.__file__).parent.glob("_core.*"))
    if not built:
        logger.warning("the CPU core was not built, the ops run through plain torch: reinstall with a C++ compiler")
        return None
    try:
        return Core(built[0], library.torch_parallel_for())
    except OSError as error:
        logger.warning("the CPU core cannot be loaded, the ops run through plain torch: %s", error)
        return None


def _quantize_activation(
    x: Tensor, codebooks: Tensor, array_size: int, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    core, leading = _core(), x.shape[:-1]
    rows = x.detach().reshape(leading.numel(), x.shape[-1]).contiguous()
    scale = None if static_scale is None else static_scale.float().view(1, 1).repeat(rows.shape[0], 1)
    packed = core.encode(_tables(codebooks, array_size), rows, array_size, scale)
    scales = packed.scales.view(torch.float8_e4m3fn)
    parts = (packed.codes, packed.selectors, scales, packed.tensor_scale)
    codes, selectors, scales, tensor_scale = (part.view(*leading, part.shape[1]) for part in parts)
    return codes, selectors, scales, tensor_scale


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
    return _core().decode(_tables(codebooks, array_size), packed)


def _core() -> Core:
    core = cpu_core()
    assert core is not None, "bound without a core"
    return core


def _tables(codebooks: Tensor, array_size: int) -> Tables:
    return _cached_tables(tuple(codebooks.flatten().tolist()), tuple(codebooks.shape), codebooks.dtype, array_size)


@lru_cache(maxsize=32)
def _cached_tables(entries: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, array_size: int) -> Tables:
    codebooks = torch.tensor(entries, dtype=dtype).view(shape)
    check_codebooks(codebooks, FormatSpec(shape[0], array_size))
    return _core().tables(codebooks)
