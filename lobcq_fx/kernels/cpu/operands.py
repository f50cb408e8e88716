"""The core's operands: as tensors, and as the structures of lobcq.h that point to them.

A structure does not own memory: keep the operand while the structure is in use.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format.spec import FormatSpec
from lobcq_fx.format.state_rows import StateRows

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`enum lobcq_dtype`."""


@dataclass(frozen=True)
class PackedOperand:
    """An operand as stored: the tensors of `lobcq_fx.format.Encoded`, E4M3 scales as uint8 bytes.

    codes uint8 [R, Kp/2]; selectors uint8 [R, ...]; scales uint8 [R, Kp/L_A]; tensor_scale fp32 [] or [R, 1].
    """

    codes: Tensor
    selectors: Tensor
    scales: Tensor
    tensor_scale: Tensor
    spec: FormatSpec
    columns: int

    @classmethod
    def empty(cls, rows: int, columns: int, spec: FormatSpec, tensor_scale: Tensor) -> PackedOperand:
        """Room for an operand [rows, columns]."""
        widths = (spec.code_bytes(columns), spec.selector_bytes(columns), spec.num_arrays(columns))
        codes, selectors, scales = (torch.empty((rows, n), dtype=torch.uint8, device="cpu") for n in widths)
        return cls(codes, selectors, scales, tensor_scale, spec, columns)


@dataclass(frozen=True)
class Int8Operand:
    """An activation in int8: the tensors of `lobcq_fx.format.Int8Activation`, E4M3 scales as uint8 bytes.

    entries int8 [R, Kp]; scales uint8 [R, Kp/L_A]; tensor_scale fp32 [] or [R, 1].
    """

    entries: Tensor
    scales: Tensor
    tensor_scale: Tensor
    array_size: int
    columns: int

    @classmethod
    def empty(cls, rows: int, columns: int, array_size: int, tensor_scale: Tensor) -> Int8Operand:
        """Room for an operand [rows, columns]."""
        spec = FormatSpec(1, array_size)
        entries = torch.empty((rows, spec.padded_columns(columns)), dtype=torch.int8, device="cpu")
        scales = torch.empty((rows, spec.num_arrays(columns)), dtype=torch.uint8, device="cpu")
        return cls(entries, scales, tensor_scale, array_size, columns)


@dataclass(frozen=True)
class KernelWeight:
    """A weight [N, K] in kernel layout (`data`: opaque bytes) and its tensor scale."""

    data: Tensor
    rows: int
    columns: int
    spec: FormatSpec
    tensor_scale: float


@dataclass(frozen=True)
class KernelActivation:
    """An activation [M, K], encoded, in int8 or split (`data`: opaque bytes), for any number of linears."""

    data: Tensor
    rows: int
    columns: int
    array_size: int
    kind: int


@dataclass(frozen=True)
class Tables:
    """Look-up tables of one codebook set (`data`: opaque bytes)."""

    data: Tensor
    num_codebooks: int


class CMatrix(ctypes.Structure):
    """`lobcq_matrix`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class CPacked(ctypes.Structure):
    """`lobcq_packed`."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("selectors", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("tensor_scale", ctypes.c_void_p),
        ("num_tensor_scales", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("num_codebooks", ctypes.c_int32),
        ("array_size", ctypes.c_int32),
    )


class CInt8(ctypes.Structure):
    """`lobcq_int8`."""

    _fields_ = (
        ("entries", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("tensor_scale", ctypes.c_void_p),
        ("num_tensor_scales", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("array_size", ctypes.c_int32),
    )


class CWeight(ctypes.Structure):
    """`lobcq_weight`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("num_codebooks", ctypes.c_int32),
        ("array_size", ctypes.c_int32),
    )


class CProduct(ctypes.Structure):
    """`lobcq_product`."""

    _fields_ = (
        ("tables", ctypes.c_void_p),
        ("weight", ctypes.POINTER(CWeight)),
        ("weight_scale", ctypes.c_float),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.POINTER(CMatrix)),
    )


class CActivation(ctypes.Structure):
    """`lobcq_activation`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("array_size", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    )


class CFeedback(ctypes.Structure):
    """`lobcq_feedback`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "other_errors", "coupling", "power")),
        *((name, ctypes.c_void_p) for name in ("codes", "selectors", "scales", "errors", "costs")),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("array_size", ctypes.c_int32),
        ("tensor_scale", ctypes.c_float),
    )


class CStates(ctypes.Structure):
    """`lobcq_states`."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("array_size", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("strides", ctypes.c_int64 * 3),
    )


class CNewStates(ctypes.Structure):
    """`lobcq_new_states`."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row_bytes", "batch", "heads", "tokens", "width")),
        *((name, ctypes.c_int32) for name in ("dtype", "array_size")),
    )


class CAttention(ctypes.Structure):
    """`lobcq_attention`."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("query_strides", ctypes.c_int64 * 3),
        ("keys", CStates),
        ("values", CStates),
        ("mask", ctypes.c_void_p),
        ("mask_strides", ctypes.c_int64 * 4),
        ("out", ctypes.c_void_p),
        ("out_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("batch", "query_heads", "queries", "heads", "tokens")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "mask_kind", "mask_dtype", "products")),
    )


def c_states(rows: Tensor, layout: StateRows) -> CStates:
    """The structure of rows uint8 [B, P, row_bytes].

    Raises:
        ValueError: they are no such rows.
    """
    require("rows", rows, torch.uint8, (*rows.shape[:2], layout.row_bytes))
    return CStates(rows.data_ptr(), layout.row_bytes, layout.width, layout.spec.array_size)


def c_float_states(x: Tensor) -> CStates:
    """The structure of keys or values [B, H, P, D] as floats.

    Raises:
        ValueError: they are none on the CPU in a float dtype of the format, or those of a head are apart.
    """
    if x.dim() != 4 or x.dtype not in DTYPES or x.device.type != "cpu" or (x.shape[3] > 1 and x.stride(3) != 1):
        raise ValueError(f"{x.dtype} {tuple(x.shape)} of strides {x.stride()} on {x.device}: pass CPU states of floats")
    return CStates(x.data_ptr(), 0, x.shape[3], 0, DTYPES[x.dtype], (ctypes.c_int64 * 3)(*x.stride()[:3]))


def c_matrix(x: Tensor) -> CMatrix:
    """The structure of a matrix.

    Raises:
        ValueError: it is no matrix on the CPU in a float dtype of the format, or its rows overlap.
    """
    if x.dim() != 2 or x.dtype not in DTYPES or x.device.type != "cpu":
        raise ValueError(f"{x.dtype} {tuple(x.shape)} on {x.device}: pass a CPU matrix in fp32, bf16 or fp16")
    rows, columns = x.shape
    stride = x.stride(0) if rows > 1 and columns > 0 else columns
    if stride < columns or (columns > 1 and rows > 0 and x.stride(1) != 1):
        raise ValueError(f"strides {x.stride()}: the last dimension must be contiguous, rows must not overlap")
    return CMatrix(x.data_ptr(), rows, columns, stride, DTYPES[x.dtype])


def require(name: str, tensor: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> None:
    """Refuse what the core, which is given an address alone, would read or write beyond.

    Raises:
        ValueError: not on the CPU, of another dtype or none of the shapes, or not contiguous.
    """
    fits = tensor.dtype == dtype and tuple(tensor.shape) in shapes
    if not fits or tensor.device.type != "cpu" or not tensor.is_contiguous():
        actual = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        raise ValueError(f"{name} is {actual}: expected contiguous {dtype} of {shapes[-1]} on the CPU")


def c_packed(packed: PackedOperand) -> CPacked:
    """The structure of a packed operand.

    Raises:
        ValueError: a part has another dtype or shape than its format says, or is not contiguous.
    """
    spec, rows = packed.spec, packed.codes.shape[0]
    expected = {
        "codes": spec.code_bytes(packed.columns),
        "selectors": spec.selector_bytes(packed.columns),
        "scales": spec.num_arrays(packed.columns),
    }
    for name, width in expected.items():
        require(name, getattr(packed, name), torch.uint8, (rows, width))
    require("tensor_scale", packed.tensor_scale, torch.float32, (), (rows, 1))
    pointers = (packed.codes, packed.selectors, packed.scales, packed.tensor_scale)
    return CPacked(
        *(p.data_ptr() for p in pointers), packed.tensor_scale.numel(), rows, packed.columns, spec.num_codebooks,
        spec.array_size,
    )  # fmt: skip


def c_int8(operand: Int8Operand) -> CInt8:
    """The structure of an activation in int8.

    Raises:
        ValueError: a part has another dtype or shape than it has to, or is not contiguous.
    """
    spec, rows = FormatSpec(1, operand.array_size), operand.entries.shape[0]
    require("entries", operand.entries, torch.int8, (rows, spec.padded_columns(operand.columns)))
    require("scales", operand.scales, torch.uint8, (rows, spec.num_arrays(operand.columns)))
    require("tensor_scale", operand.tensor_scale, torch.float32, (), (rows, 1))
    pointers = (part.data_ptr() for part in (operand.entries, operand.scales, operand.tensor_scale))
    return CInt8(*pointers, operand.tensor_scale.numel(), rows, operand.columns, operand.array_size)


def c_weight(weight: KernelWeight) -> CWeight:
    """The structure of a weight in kernel layout."""
    spec = weight.spec
    return CWeight(weight.data.data_ptr(), weight.rows, weight.columns, spec.num_codebooks, spec.array_size)


def c_activation(a: KernelActivation) -> CActivation:
    """The structure of an activation in kernel layout."""
    return CActivation(a.data.data_ptr(), a.rows, a.columns, a.array_size, a.kind)
