"""The core for another CPU, run by an emulator in a process of its own, with the methods of `library.Core`.

What the methods do is what `Core`'s do; instead of a call through ctypes, `native/core_server.cpp` makes it and the
tensors travel as bytes.
"""

from __future__ import annotations

import struct
import subprocess
from enum import IntEnum, auto

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.cpu.library import COUPLING_PANEL, CoreError
from lobcq_fx.kernels.cpu.operands import Int8Operand, KernelActivation, KernelWeight, PackedOperand, Tables

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ENCODED, _FLOAT, _INT8 = 0, 1, 2
_SHARED_SCALE, _ROW_SCALES, _ABSMAX_SCALES = 0, 1, 2
_NOT_FINITE = 5
_NONE = torch.empty(0)


class _Operation(IntEnum):
    ISA = 0
    TABLES = auto()
    TENSOR_SCALE = auto()
    ENCODE = auto()
    ENCODE_INT8 = auto()
    ROTATE = auto()
    ENCODE_SEARCHED = auto()
    COMPENSATE = auto()
    DECODE = auto()
    SQUARES = auto()
    PACK_WEIGHT = auto()
    UNPACK_WEIGHT = auto()
    ENCODE_ACTIVATION = auto()
    LOAD_ACTIVATION = auto()
    LOAD_INT8_ACTIVATION = auto()
    SPLIT_ACTIVATION = auto()
    LINEAR = auto()
    FLOATING_POINT_MODE = auto()


_FIELDS = (
    "rows", "columns", "row_stride", "dtype", "operand_rows", "operand_columns", "num_tensor_scales", "num_codebooks",
    "array_size", "scale_rule", "kind", "rotated",
)  # fmt: skip


class EmulatedCore:
    """A running `core_server`.

    Args:
        command: that runs it.
        environment: all of its environment variables.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        """End the process."""
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    @property
    def isa(self) -> str:
        return bytes(self._call(_Operation.ISA, [], [0])[0].tolist()).decode()

    def floating_point_mode(self, mode: int | None = None) -> int:
        """The floating-point control register of the thread that computes, and optionally what it is to be."""
        values = [] if mode is None else [torch.tensor([mode])]
        return int(self._call(_Operation.FLOATING_POINT_MODE, values, [8])[0].view(torch.int64))

    def tables(self, codebooks: Tensor) -> Tables:
        n = codebooks.shape[0]
        return Tables(self._call(_Operation.TABLES, [codebooks], [0], num_codebooks=n)[0], n)

    def tensor_scale(self, x: Tensor) -> Tensor:
        status, (scale, bad) = self._request(_Operation.TENSOR_SCALE, [_storage(x)], [4, 16], **_matrix(x))
        if status == _NOT_FINITE:
            row, column = bad.view(torch.int64).tolist()
            raise ValueError(f"x[{row}, {column}] is {x[row, column].item()}: a weight must be finite")
        _check(_Operation.TENSOR_SCALE, status)
        return scale.view(torch.float32)[0]

    def encode(self, tables: Tables, x: Tensor, array_size: int, tensor_scale: Tensor | None = None) -> PackedOperand:
        rows, columns = x.shape
        spec = FormatSpec(tables.num_codebooks, array_size)
        scale = torch.empty((rows, 1)) if tensor_scale is None else tensor_scale.float()
        outputs = self._call(
            _Operation.ENCODE, [tables.data, _storage(x), _NONE if tensor_scale is None else scale],
            _packed_bytes(spec, rows, columns, scale), scale_rule=_scale_rule(tensor_scale),
            **_matrix(x), **_operand(spec, rows, columns, scale.numel()),
        )  # fmt: skip
        return _packed(outputs, spec, rows, columns, outputs[3].view(torch.float32).reshape(scale.shape))

    def encode_int8(self, x: Tensor, array_size: int, tensor_scale: Tensor | None = None) -> Int8Operand:
        rows, columns = x.shape
        spec = FormatSpec(1, array_size)
        scale = torch.empty((rows, 1)) if tensor_scale is None else tensor_scale.float()
        sizes = [rows * spec.padded_columns(columns), rows * spec.num_arrays(columns), 4 * scale.numel()]
        entries, scales, scale_bytes = self._call(
            _Operation.ENCODE_INT8, [_storage(x), _NONE if tensor_scale is None else scale], sizes,
            scale_rule=_scale_rule(tensor_scale), **_matrix(x), **_operand(spec, rows, columns, scale.numel()),
        )  # fmt: skip
        return Int8Operand(
            entries.view(torch.int8).view(rows, spec.padded_columns(columns)),
            scales.view(rows, spec.num_arrays(columns)),
            scale_bytes.view(torch.float32).reshape(scale.shape),
            array_size,
            columns,
        )

    def rotate(self, x: Tensor, array_size: int) -> Tensor:
        sizes = [4 * x.numel()]
        (values,) = self._call(_Operation.ROTATE, [_storage(x)], sizes, array_size=array_size, **_matrix(x))
        return values.view(torch.float32).reshape(x.shape)

    def encode_searched(self, tables: Tables, x: Tensor, array_size: int, tensor_scale: Tensor) -> PackedOperand:
        rows, columns = x.shape
        spec, scale = FormatSpec(tables.num_codebooks, array_size), tensor_scale.float()
        outputs = self._call(
            _Operation.ENCODE_SEARCHED, [tables.data, _storage(x), scale], _packed_bytes(spec, rows, columns, scale),
            **_matrix(x), **_operand(spec, rows, columns, 1),
        )  # fmt: skip
        return _packed(outputs, spec, rows, columns, outputs[3].view(torch.float32).reshape(scale.shape))

    def compensate(
        self, tables: Tables, weight: Tensor, other_errors: Tensor, coupling: Tensor, power: Tensor,
        tensor_scale: float, array_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        rows, columns = weight.shape
        panels = coupling.reshape(columns, columns // COUPLING_PANEL, COUPLING_PANEL).transpose(0, 1).contiguous()
        arrays = [tables.data, weight, other_errors, panels, power, torch.tensor([tensor_scale])]
        sizes = [rows * columns, rows * columns // 8, rows * columns // array_size, 4 * rows * columns, 16 * rows]
        *parts, _, costs = self._call(_Operation.COMPENSATE, arrays, sizes, array_size=array_size, **_matrix(weight))
        codes, selectors, scales = (part.view(rows, -1) for part in parts)
        return codes, selectors, scales, costs.view(torch.float64).view(rows, 2)

    def decode(self, tables: Tables, packed: PackedOperand) -> Tensor:
        out = torch.empty((packed.codes.shape[0], packed.columns))
        arrays = [tables.data, *_parts(packed)]
        values = self._call(_Operation.DECODE, arrays, [4 * out.numel()], **_matrix(out), **_fields(packed))[0]
        return values.view(torch.float32).reshape(out.shape)

    def squares(self, tables: Tables, x: Tensor, packed: PackedOperand) -> Tensor:
        arrays = [tables.data, _storage(x), *_parts(packed)]
        sums = self._call(_Operation.SQUARES, arrays, [16 * x.shape[0]], **_matrix(x), **_fields(packed))[0]
        return sums.view(torch.float64).view(x.shape[0], 2)

    def pack_weight(self, packed: PackedOperand) -> KernelWeight:
        data = self._call(_Operation.PACK_WEIGHT, _parts(packed), [0], **_fields(packed))[0]
        scale = float(packed.tensor_scale)
        return KernelWeight(data, packed.codes.shape[0], packed.columns, packed.spec, scale)

    def unpack_weight(self, weight: KernelWeight) -> PackedOperand:
        spec, rows, columns = weight.spec, weight.rows, weight.columns
        scale = torch.tensor(weight.tensor_scale)
        sizes = _packed_bytes(spec, rows, columns, scale)
        outputs = self._call(_Operation.UNPACK_WEIGHT, [weight.data], sizes, **_operand(spec, rows, columns, 1))
        return _packed(outputs, spec, rows, columns, scale)

    def encode_activation(
        self,
        tables: Tables | None,
        x: Tensor,
        array_size: int,
        tensor_scale: Tensor | None = None,
        rotated: bool = False,
    ) -> KernelActivation:
        arrays = [
            _NONE if tables is None else tables.data,
            _storage(x),
            _NONE if tensor_scale is None else tensor_scale.float(),
        ]
        fields = {"scale_rule": _scale_rule(tensor_scale), "rotated": int(rotated)}
        kind = _INT8 if tables is None else _ENCODED
        return self._activation(_Operation.ENCODE_ACTIVATION, arrays, x, array_size, kind, **fields)

    def load_activation(self, tables: Tables, packed: PackedOperand) -> KernelActivation:
        rows, columns = packed.codes.shape[0], packed.columns
        data = self._call(
            _Operation.LOAD_ACTIVATION, [tables.data, *_parts(packed)], [0], rows=rows, kind=_ENCODED, **_fields(packed)
        )[0]
        return KernelActivation(data, rows, columns, packed.spec.array_size, _ENCODED)

    def load_int8_activation(self, operand: Int8Operand) -> KernelActivation:
        rows, columns, scale = operand.entries.shape[0], operand.columns, operand.tensor_scale
        fields = _operand(FormatSpec(1, operand.array_size), rows, columns, scale.numel())
        arrays = [operand.entries, operand.scales, scale]
        data = self._call(_Operation.LOAD_INT8_ACTIVATION, arrays, [0], rows=rows, kind=_INT8, **fields)[0]
        return KernelActivation(data, rows, columns, operand.array_size, _INT8)

    def split_activation(self, x: Tensor, array_size: int) -> KernelActivation:
        return self._activation(_Operation.SPLIT_ACTIVATION, [_NONE, _storage(x)], x, array_size, _FLOAT)

    def linear(
        self,
        tables: Tables,
        weight: KernelWeight,
        activation: KernelActivation,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        out = torch.empty((activation.rows, weight.rows), dtype=dtype)
        arrays = [
            tables.data, weight.data, torch.tensor([weight.tensor_scale]), activation.data,
            _NONE if bias is None else bias.float(),
        ]  # fmt: skip
        fields = _matrix(out) | _operand(weight.spec, weight.rows, weight.columns, 0)
        values = self._call(_Operation.LINEAR, arrays, [out.numel() * out.itemsize], kind=activation.kind, **fields)[0]
        return values.view(dtype).reshape(out.shape)

    def _activation(
        self, operation: _Operation, arrays: list[Tensor], x: Tensor, array_size: int, kind: int, **fields: int
    ) -> KernelActivation:
        rows, columns = x.shape
        fields |= _matrix(x) | {"operand_columns": columns, "array_size": array_size, "kind": kind}
        return KernelActivation(self._call(operation, arrays, [0], **fields)[0], rows, columns, array_size, kind)

    def _call(self, operation: _Operation, inputs: list[Tensor], sizes: list[int], **fields: int) -> list[Tensor]:
        status, outputs = self._request(operation, inputs, sizes, **fields)
        _check(operation, status)
        return outputs

    def _request(
        self, operation: _Operation, inputs: list[Tensor], sizes: list[int], **fields: int
    ) -> tuple[int, list[Tensor]]:
        numbers = [operation, len(inputs), len(sizes), *(fields.pop(name, 0) for name in _FIELDS)]
        assert not fields
        message = [struct.pack(f"<{len(numbers)}q", *numbers)]
        for tensor in inputs:
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            message += [struct.pack("<q", len(data)), data]
        message.append(struct.pack(f"<{len(sizes)}q", *sizes))
        self._server.stdin.write(b"".join(message))
        self._server.stdin.flush()
        status = self._read_number()
        return status, [self._read(self._read_number()) for _ in sizes]

    def _read_number(self) -> int:
        data = self._server.stdout.read(8)
        assert len(data) == 8, f"core_server ended with {self._server.wait()}"
        return struct.unpack("<q", data)[0]

    def _read(self, size: int) -> Tensor:
        data = self._server.stdout.read(size)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def _check(operation: _Operation, status: int) -> None:
    if status:
        raise CoreError(operation.name.lower(), status, f"status {status}")


def _storage(x: Tensor) -> Tensor:
    """The elements from the first to the last of a matrix, with what lies between its rows."""
    rows, columns = x.shape
    return x.as_strided(((rows - 1) * x.stride(0) + columns,), (1,)) if rows and columns else x.reshape(-1)


def _matrix(x: Tensor) -> dict[str, int]:
    rows, columns = x.shape
    stride = x.stride(0) if rows > 1 and columns else columns
    return {"rows": rows, "columns": columns, "row_stride": stride, "dtype": _DTYPES[x.dtype]}


def _operand(spec: FormatSpec, rows: int, columns: int, tensor_scales: int) -> dict[str, int]:
    return {
        "operand_rows": rows, "operand_columns": columns, "num_tensor_scales": tensor_scales,
        "num_codebooks": spec.num_codebooks, "array_size": spec.array_size,
    }  # fmt: skip


def _fields(packed: PackedOperand) -> dict[str, int]:
    return _operand(packed.spec, packed.codes.shape[0], packed.columns, packed.tensor_scale.numel())


def _parts(packed: PackedOperand) -> list[Tensor]:
    return [packed.codes, packed.selectors, packed.scales, packed.tensor_scale]


def _widths(spec: FormatSpec, columns: int) -> tuple[int, int, int]:
    return spec.code_bytes(columns), spec.selector_bytes(columns), spec.num_arrays(columns)


def _packed_bytes(spec: FormatSpec, rows: int, columns: int, scale: Tensor) -> list[int]:
    return [*(rows * width for width in _widths(spec, columns)), 4 * scale.numel()]


def _packed(parts: list[Tensor], spec: FormatSpec, rows: int, columns: int, scale: Tensor) -> PackedOperand:
    codes, selectors, scales = (
        part.reshape(rows, width) for part, width in zip(parts, _widths(spec, columns), strict=False)
    )
    return PackedOperand(codes, selectors, scales, scale, spec, columns)


def _scale_rule(tensor_scale: Tensor | None) -> int:
    if tensor_scale is None:
        return _ABSMAX_SCALES
    return _SHARED_SCALE if tensor_scale.dim() == 0 else _ROW_SCALES
