"""Checks a call's operands by the table in `contracts`, before anything is computed.

Implementations call `check`, fake kernels `check_fake`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.errors import LobcqError, OperandError
from lobcq_fx.format import FormatSpec
from lobcq_fx.format.state_rows import StateRows
from lobcq_fx.ops.contracts import FLOATS, OPERANDS, Operand
from lobcq_fx.ops.schemas import NO_GRADIENT

Arguments = Mapping[str, Any]
"""Of a call, by the schema's names. Operands that are missing are not checked."""

Shape = tuple[int | None, ...]
"""None matches any size."""

OR_1 = " or 1"
"""Behind the name of a size: a dimension that may be repeated."""


@dataclass(frozen=True)
class PrepackedSizes:
    """What a device's kernels lay out.

    table_bytes: of look-up tables, and how many codebooks they are of.
    weight_bytes: called with N, K and the format.
    """

    table_bytes: Mapping[int, int]
    weight_bytes: Callable[[int, int, FormatSpec], int]


def check_fake(op: str, given: Arguments) -> None:
    """Check what needs no size, which may be symbolic where a graph is traced: devices, dtypes, ranks, lengths.

    Raises:
        OperandError: an operand breaks its contract (names it, what it is and what to pass).
    """
    for name in ("dtype", "normalized"):
        if given.get(name, torch.float32) not in FLOATS:
            raise OperandError(f"{op}: {name} is {_dtype_name(given[name])}: pass {_dtype_names(FLOATS)}")
    device = given[OPERANDS[op][0].name].device
    for operand in OPERANDS[op]:
        for name, tensor, _ in _tensors(op, operand, given):
            none = _stands_for_none(operand, tensor)
            ranked = none or (tensor.dim() >= 1 if ... in operand.shape else tensor.dim() == len(operand.shape))
            known = tensor.dtype in (FLOATS if none else _dtypes(operand, given)) and tensor.layout is torch.strided
            if tensor.device != device or not (operand.opaque or (known and ranked)):
                raise _error(op, operand, name, tensor, given, operand.shape)


def check(op: str, given: Arguments, prepacked: PrepackedSizes | None = None) -> None:
    """Check everything.

    Args:
        op: its name.
        given: what it was called with.
        prepacked: the sizes of the device's layout; None where no operand in it is given.

    Raises:
        OperandError: an operand breaks its contract (names it, what it is and what to pass).
    """
    check_fake(op, given)
    sizes = _Sizes(op, given, prepacked)
    for operand in OPERANDS[op]:
        for name, tensor, index in _tensors(op, operand, given):
            if _stands_for_none(operand, tensor):
                continue
            shape = sizes.of(operand, tensor, index)
            fits = len(shape) == tensor.dim() and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
            fits = fits and tensor.dtype in _dtypes(operand, given) and tensor.layout is torch.strided
            if not (fits and (tensor.is_contiguous() or not operand.contiguous) and _lies_in_its_storage(tensor)):
                raise _error(op, operand, name, tensor, given, shape)
            if operand.positive and tensor.device.type == "cpu" and not 0 < tensor.item() < math.inf:
                raise OperandError(f"{op}: {name} is {tensor.item()}: it must be positive and finite")


def check_whole_arrays(op: str, name: str, operand: Tensor, array_size: int) -> None:
    """Refuse columns that fill no block array.

    Raises:
        OperandError: K is no multiple of L_A.
    """
    columns = operand.shape[-1]
    if columns % array_size:
        raise OperandError(f"{op}: {name} has {columns} columns: pass whole block arrays, multiples of {array_size}")


def refuse_gradient(x: Tensor) -> None:
    """Refuse an operand that requires a gradient, where no formula of autograd's does.

    Raises:
        LobcqError: it requires one.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise LobcqError(NO_GRADIENT)


def _tensors(op: str, operand: Operand, given: Arguments) -> Iterator[tuple[str, Tensor, int]]:
    """What a call gives as an operand: names, tensors and their places in a list."""
    value = given.get(operand.name)
    if isinstance(value, Tensor):
        yield operand.name, value, 0
    elif value is not None:
        if len(value) != len(given["out_features"]):
            raise OperandError(f"{op}: {operand.name} and out_features differ in length")
        for index, tensor in enumerate(value):
            yield f"{operand.name}[{index}]", tensor, index


class _Sizes:
    """A call's sizes, from which its operands' shapes follow."""

    def __init__(self, op: str, given: Arguments, prepacked: PrepackedSizes | None) -> None:
        self.op, self.given, self.prepacked = op, given, prepacked
        activation = given[OPERANDS[op][0].name]
        self.leading = tuple(activation.shape[:-1])
        self.columns: int = given.get("in_features", activation.shape[-1])
        if self.columns < 0:
            raise OperandError(f"{op}: in_features is {self.columns}")
        if "array_size" in given:
            self.format(1)

    def of(self, operand: Operand, tensor: Tensor, index: int) -> Shape:
        """The shape that an operand must have, of which `tensor` was given."""
        shape: list[int | None] = []
        for place, part in enumerate(operand.shape):
            if isinstance(part, EllipsisType):
                shape += self.leading
            elif isinstance(part, str) and part.endswith(OR_1) and tensor.shape[place : place + 1] == (1,):
                shape.append(1)
            else:
                shape.append(self.size(part.removesuffix(OR_1), tensor, index) if isinstance(part, str) else part)
        return tuple(shape)

    def size(self, name: str, tensor: Tensor, index: int) -> int | None:
        """One size of an operand."""
        if "." in name:
            other, _, dimension = name.partition(".")
            known: int = self.given[other].shape[int(dimension)]
            return known
        match name:
            case "K":
                return self.columns
            case "B" | "H" | "T" | "P" | "D" | "S":
                return None
            case "E":
                matrices: int = self.given["w_codes" if "w_codes" in self.given else "weights"].shape[0]
                return matrices
            case "batch" | "query_heads" | "queries" | "tokens":
                return self.attention[name]
            case "N":
                return self.outputs(index)
            case "N_c":
                return self.format(tensor.shape[0], self.given.get("key_array_size")).num_codebooks
            case "code_bytes":
                return self.activation_format.code_bytes(self.columns)
            case "selector_bytes":
                return self.activation_format.selector_bytes(self.columns)
            case "padded_columns":
                return self.activation_format.padded_columns(self.columns)
            case "arrays":
                return self.activation_format.num_arrays(self.columns)
            case "w_code_bytes":
                return self.stored_format(self.given["w_codebooks"]).code_bytes(self.columns)
            case "w_selector_bytes":
                return self.stored_format(self.given["w_codebooks"]).selector_bytes(self.columns)
            case "w_arrays":
                return self.stored_format(self.given["w_codebooks"]).num_arrays(self.columns)
            case "row_bytes":
                return self.row_bytes(self.given["width"], self.given["array_size"])
            case "key_row_bytes":
                return self.row_bytes(self.columns, self.given["key_array_size"])
            case "value_row_bytes":
                return self.row_bytes(self.given["value_width"], self.given["value_array_size"])
            case "table_bytes":
                return min(self.layout.table_bytes, key=lambda known: abs(known - tensor.numel()))
            case _:
                assert name == "weight_bytes", name
                rows = self.outputs(index)
                return None if rows is None else self.layout.weight_bytes(rows, self.columns, self.prepacked_format)

    @property
    def attention(self) -> dict[str, int]:
        """Sizes of an attention's mask, in order."""
        batch, heads, queries, _ = self.given["query"].shape
        tokens = self.given["keys"].shape[1] if "keys" in self.given else self.given["key"].shape[2]
        return {"batch": batch, "query_heads": heads, "queries": queries, "tokens": tokens}

    def row_bytes(self, width: int, array_size: int) -> int:
        """Of a token's keys or values."""
        spec = self.format(self.given["codebooks"].shape[0], array_size)
        return StateRows(spec, self.given["heads"], width).row_bytes

    def outputs(self, index: int) -> int | None:
        """N of linear `index`; None where the op has none, or its weight says how many."""
        if "out_features" not in self.given:
            return self.given["w_codes"].shape[-2] if "w_codes" in self.given else None
        given = self.given["out_features"]
        outputs: int = given if isinstance(given, int) else given[index]
        if outputs < 0:
            raise OperandError(f"{self.op}: out_features[{index}] is {outputs}")
        return outputs

    @property
    def activation_format(self) -> FormatSpec:
        """Of no codebooks, in int8, only the arrays count."""
        num_codebooks = self.given["codebooks"].shape[0] if "codebooks" in self.given else 1
        return self.format(num_codebooks, self.given.get("activation_array_size"))

    @property
    def layout(self) -> PrepackedSizes:
        assert self.prepacked is not None, "operands in a layout that is not known"
        return self.prepacked

    @property
    def prepacked_format(self) -> FormatSpec:
        return self.format(self.layout.table_bytes[self.given["weight_tables"].numel()])

    def stored_format(self, codebooks: Tensor) -> FormatSpec:
        return self.format(codebooks.shape[0])

    def format(self, num_codebooks: int, array_size: int | None = None) -> FormatSpec:
        """array_size: that of all operands where it is None."""
        try:
            return FormatSpec(num_codebooks, self.given["array_size"] if array_size is None else array_size)
        except ValueError as error:
            raise OperandError(f"{self.op}: {error}") from None


def _stands_for_none(operand: Operand, tensor: Tensor) -> bool:
    return operand.or_empty and tensor.dim() == 1 and tensor.shape[0] == 0


def _lies_in_its_storage(tensor: Tensor) -> bool:
    """False for a storage that was shrunk or given back: whatever reads the tensor would read beyond it."""
    if tensor.numel() == 0:
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    return int(tensor.storage_offset() + last) < held


def _dtypes(operand: Operand, given: Arguments) -> tuple[torch.dtype, ...]:
    if operand.like is None:
        return operand.dtypes
    like = given.get(operand.like, given.get("x"))
    return (like.dtype if isinstance(like, Tensor) else like,)


def _error(
    op: str, operand: Operand, name: str, tensor: Tensor, given: Arguments, expected: Sequence[object]
) -> OperandError:
    device = given[OPERANDS[op][0].name].device
    actual = f"{_dtype_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"
    if tensor.layout is not torch.strided:
        actual += f", {tensor.layout}"
    elif not tensor.is_contiguous():
        actual += f" with strides {list(tensor.stride())}"
    elif tensor.device.type != "meta" and not _lies_in_its_storage(tensor):
        actual += f" in a storage of {tensor.untyped_storage().nbytes()} bytes"
    shape = ", ".join("..." if size is ... else "any" if size is None else str(size) for size in expected)
    wanted = f"{'contiguous ' if operand.contiguous else ''}{_dtype_names(_dtypes(operand, given))} [{shape}]"
    return OperandError(f"{op}: {name} is {actual}: pass {wanted} on {device}")


def _dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(_dtype_name(dtype) for dtype in dtypes)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
