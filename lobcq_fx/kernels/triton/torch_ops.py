"""The `lobcq::` ops by Triton kernels: what bind.py registers for CUDA tensors.

The prepacked ops wait for nothing on the host, so that CUDA graphs can hold them. Those on weights as they are stored
look up tables by the codebooks' values, which they wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lobcq_fx.errors import LobcqError
from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.triton.decode_gemm import MAX_ROWS, decode_gemm
from lobcq_fx.kernels.triton.dequantize import dequantize
from lobcq_fx.kernels.triton.encode import Packed, encode_rows
from lobcq_fx.kernels.triton.encode_operand import encode_operand
from lobcq_fx.kernels.triton.grouped_gemm import Groups, grouped_gemm
from lobcq_fx.kernels.triton.lookup import TABLE_BYTES, Lookup
from lobcq_fx.kernels.triton.operands import Activation, Epilogue, Linear
from lobcq_fx.kernels.triton.prefill_gemm import prefill_gemm
from lobcq_fx.kernels.triton.prologues import AddRmsNorm, LayerNorm, Prologue, RmsNorm, SiluMul
from lobcq_fx.kernels.triton.weight_layout import WeightTiles, weight_bytes
from lobcq_fx.ops import schemas
from lobcq_fx.ops.grouped_linear import StoredGroupedLinears, check_groups, result_shape
from lobcq_fx.ops.linear import StoredLinears
from lobcq_fx.ops.operand_checks import PrepackedSizes, check, check_whole_arrays
from lobcq_fx.ops.schemas import NO_GRADIENT

INTEGER_ARRAY = 128
"""Prefill multiplies integers from this L_A on: scaling each array costs about half of what it saves. Not measured."""


_SIZES = PrepackedSizes(TABLE_BYTES, weight_bytes)


class Linears(NamedTuple):
    """Linears of one activation, as the prepacked ops take them; their results may each be added to a residual."""

    weights: list[Tensor]
    tensor_scales: list[Tensor]
    weight_tables: Tensor
    biases: list[Tensor]
    out_features: list[int]
    array_size: int


def quantize_activation(x: Tensor, codebooks: Tensor, array_size: int, static_scale: Tensor | None = None) -> Packed:
    """`lobcq::quantize_activation`."""
    check(schemas.QUANTIZE_ACTIVATION, locals())
    spec, leading = FormatSpec(codebooks.shape[0], array_size), x.shape[:-1]
    parts = encode_rows(_rows(x.detach()), _lookup(codebooks), spec, static_scale)
    codes, selectors, scales, tensor_scale = (part.view(*leading, part.shape[1]) for part in parts)
    return codes, selectors, scales, tensor_scale


def _encode_and_multiply(
    x: Tensor, prologue: Prologue | None, tables: Tensor | None, static_scale: Tensor | None, linears: Linears,
    residuals: list[Tensor] | None, dtype: torch.dtype, rotated: bool,
) -> list[Tensor]:  # fmt: skip
    """The linears of what the prologue makes of x [..., K], rotated or not, encoded once."""
    lookup, rows = None if tables is None else Lookup.from_bytes(tables), _rows(x)
    spec = FormatSpec(1 if lookup is None else lookup.codebooks.shape[0], linears.array_size)
    integers = rows.shape[0] <= MAX_ROWS or linears.array_size >= INTEGER_ARRAY
    a = encode_operand(rows, lookup, spec, static_scale, integers, prologue, rotated)
    return _multiply(x, a, linears, residuals, dtype)


def _multiply(
    x: Tensor, a: Activation, linears: Linears, residuals: list[Tensor] | None, dtype: torch.dtype
) -> list[Tensor]:
    """The linears of x [..., K], of which `a` is what they multiply."""
    results = _products(a, x.shape[-1], *linears, residuals, dtype)
    return [out.view(*x.shape[:-1], out.shape[1]) for out in results]


def _products(
    a: Activation,
    columns: int,
    weights: list[Tensor],
    tensor_scales: list[Tensor],
    weight_tables: Tensor,
    biases: list[Tensor],
    out_features: list[int],
    array_size: int,
    residuals: list[Tensor] | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    codebooks = Lookup.from_bytes(weight_tables).codebooks
    spec = FormatSpec(codebooks.shape[0], array_size)
    each = [None] * len(weights) if residuals is None else [_residual(residual) for residual in residuals]
    linears = []
    for weight, scale, bias, outputs, residual in zip(weights, tensor_scales, biases, out_features, each, strict=True):
        epilogue = Epilogue(scale, bias if bias.numel() else None, residual)
        linears.append(Linear(WeightTiles.of(weight, spec, outputs, columns), outputs, epilogue))
    gemm = decode_gemm if a.values.shape[0] <= MAX_ROWS and columns > 0 else prefill_gemm
    return gemm(a, linears, codebooks, spec, dtype)


def _residual(residual: Tensor) -> Tensor | None:
    """A residual [..., N] as an epilogue takes it, or None for one [0]."""
    return _rows(residual).contiguous() if residual.numel() else None


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] whose last dimension is contiguous."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _scaled_entries(
    codes: Tensor, selectors: Tensor, scales: Tensor, codebooks: Tensor, columns: int, array_size: int
) -> Tensor:
    """Entry times block-array scale, fp32 [R, K], of an operand with any leading dimensions."""
    codes, selectors, scales = (_rows(part).contiguous() for part in (codes, selectors, scales))
    spec = FormatSpec(codebooks.shape[0], array_size)
    return dequantize(codes, selectors, scales, None, codebooks.contiguous(), spec, columns, torch.float32)


def _groups_overload(name: str) -> Callable[..., Tensor]:
    """The implementation of an overload of `lobcq::grouped_linear_prepacked`.

    Rows that do not exist give NaN: to refuse them would wait for the GPU.
    """
    names = schemas.argument_names(name)

    def run(*arguments: Any) -> Tensor:
        given = dict(zip(names, arguments, strict=False))  # those left to their defaults are absent
        check(name, given, _SIZES)
        check_groups(name, given)
        x, stack, size, rotated = given["x"], given["weights"], given["array_size"], given.get("rotated", False)
        _refuse_gradients(x)
        if rotated:
            check_whole_arrays(name, "x", x, size)
        rows, outputs = _rows(x), given["out_features"]
        a = Activation(rows)
        if "activation_tables" in given:
            tables = given["activation_tables"]
            lookup = None if tables is None else Lookup.from_bytes(tables)
            encoded = FormatSpec(1 if lookup is None else lookup.codebooks.shape[0], size)
            a = encode_operand(rows, lookup, encoded, given["static_scale"], size >= INTEGER_ARRAY, None, rotated)
        codebooks = Lookup.from_bytes(given["weight_tables"]).codebooks
        ends = given["offsets"]
        if ends is None:
            ends = torch.arange(1, stack.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]
        spec, dtype = FormatSpec(codebooks.shape[0], size), given.get("dtype", x.dtype)
        groups = Groups(ends, given["rows"])
        out = grouped_gemm(a, stack, given["tensor_scales"], groups, outputs, codebooks, spec, dtype)
        return out.view(result_shape(given, outputs))

    return run


_STORED = StoredLinears(_scaled_entries)
_STORED_GROUPS = StoredGroupedLinears(_scaled_entries)
linear, linear_float_activation = _STORED.linear, _STORED.linear_float_activation
linear_int8_activation = _STORED.linear_int8_activation


def _rms_norm(given: dict[str, Any]) -> RmsNorm:
    return RmsNorm(*(given[name] for name in ("norm_weight", "eps", "offset", "round_first")))


def _add_rms_norm(given: dict[str, Any]) -> AddRmsNorm:
    x, residual = given["x"], given["residual"]
    total = torch.empty((x.shape[:-1].numel(), x.shape[-1]), dtype=x.dtype, device=x.device)
    return AddRmsNorm(_rows(residual), total, _rms_norm(given))


def _layer_norm(given: dict[str, Any]) -> LayerNorm:
    return LayerNorm(given["norm_weight"], given["norm_bias"], given["eps"])


def _silu_mul(given: dict[str, Any]) -> SiluMul:
    return SiluMul(_rows(given["up"]))


def _overload(name: str, prologue: Callable[[dict[str, Any]], Prologue] | None = None) -> Callable[..., list[Tensor]]:
    """The implementation of an overload of `lobcq::linear_prepacked`, its arguments bound by the schema's names.

    Args:
        name: of the overload.
        prologue: what the encoder begins with, from the arguments; None where it encodes x itself.
    """
    names = schemas.argument_names(name)

    def run(*arguments: Any) -> list[Tensor]:
        given = dict(zip(names, arguments, strict=False))  # those left to their defaults are absent
        residuals = given.get("residuals")
        check(name, given, _SIZES)
        _refuse_gradients(*(one for one in arguments if isinstance(one, Tensor)), *(residuals or ()))
        x = given["gate"] if "gate" in given else given["x"]
        linears = Linears(*(given[field] for field in Linears._fields))
        if "activation_tables" not in given:
            return _multiply(x, Activation(_rows(x)), linears, residuals, x.dtype)
        before = None if prologue is None else prologue(given)
        rotated = given.get("rotated", False)
        if rotated:
            check_whole_arrays(name, "x", x, linears.array_size)
        tables, scale, dtype = given["activation_tables"], given["static_scale"], given["dtype"]
        results = _encode_and_multiply(x, before, tables, scale, linears, residuals, dtype, rotated)
        return [before.sums.view(x.shape), *results] if isinstance(before, AddRmsNorm) else results

    return run


def _lookup(codebooks: Tensor) -> Lookup:
    return _cached_lookup(tuple(codebooks.flatten().tolist()), tuple(codebooks.shape), codebooks.device)


@lru_cache(maxsize=32)
def _cached_lookup(entries: tuple[int, ...], shape: tuple[int, ...], device: torch.device) -> Lookup:
    return Lookup.of(torch.tensor(entries, dtype=torch.int8, device=device).view(shape))


def _refuse_gradients(*tensors: Tensor | None) -> None:
    """No autograd formula stands between the dispatcher and the prepacked ops: one would run on every call."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise LobcqError(NO_GRADIENT)


_PROLOGUES: dict[str, Callable[[dict[str, Any]], Prologue] | None] = {
    schemas.LINEAR_PREPACKED: None,
    schemas.LINEAR_PREPACKED_FLOAT_ACTIVATION: None,
    schemas.LINEAR_PREPACKED_RESIDUAL: None,
    schemas.LINEAR_PREPACKED_FLOAT_ACTIVATION_RESIDUAL: None,
    schemas.LINEAR_PREPACKED_SILU_MUL: _silu_mul,
    schemas.LINEAR_PREPACKED_RMS_NORM: _rms_norm,
    schemas.LINEAR_PREPACKED_ADD_RMS_NORM: _add_rms_norm,
    schemas.LINEAR_PREPACKED_LAYER_NORM: _layer_norm,
}

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    schemas.QUANTIZE_ACTIVATION: quantize_activation,
    schemas.LINEAR: linear,
    schemas.LINEAR_INT8_ACTIVATION: linear_int8_activation,
    schemas.LINEAR_FLOAT_ACTIVATION: linear_float_activation,
    schemas.GROUPED_LINEAR: _STORED_GROUPS.grouped_linear,
    schemas.GROUPED_LINEAR_INT8_ACTIVATION: _STORED_GROUPS.grouped_linear_int8_activation,
    schemas.GROUPED_LINEAR_FLOAT_ACTIVATION: _STORED_GROUPS.grouped_linear_float_activation,
    **{name: _overload(name, prologue) for name, prologue in _PROLOGUES.items()},
    **{
        name: _groups_overload(name)
        for name in (schemas.GROUPED_LINEAR_PREPACKED, schemas.GROUPED_LINEAR_PREPACKED_FLOAT_ACTIVATION)
    },
}
"""What CUDA tensors run, by op."""
