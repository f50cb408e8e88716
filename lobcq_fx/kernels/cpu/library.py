"""The C core through ctypes: one Python method for each function of lobcq.h, torch tensors in and out.

Nothing here knows about dispatchers or modules. Tensors are checked for device, dtype and layout, the C side checks
the rest. ctypes releases the GIL during a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lobcq_fx.errors import ConfigError
from lobcq_fx.format.spec import BLOCK_SIZE, CODEBOOK_SIZE, FormatSpec
from lobcq_fx.format.state_rows import StateRows
from lobcq_fx.kernels.cpu.operands import (
    DTYPES,
    CAttention,
    CFeedback,
    CNewStates,
    CProduct,
    CStates,
    Int8Operand,
    KernelActivation,
    KernelWeight,
    PackedOperand,
    Tables,
    c_activation,
    c_float_states,
    c_int8,
    c_matrix,
    c_packed,
    c_states,
    c_weight,
    require,
)

ABI_VERSION = 8
ALIGNMENT = 64
"""Bytes: where the core's opaque buffers start. torch's CPU allocator aligns to as much."""

COUPLING_PANEL = 16
"""Columns of a coupling matrix that lie together where the core reads it."""

_ENCODED, _FLOAT, _INT8 = 0, 1, 2
_SHARED_SCALE, _ROW_SCALES, _ABSMAX_SCALES = 0, 1, 2
_NO_MASK, _BOOL_MASK, _ADDED_MASK = 0, 1, 2
_FLOAT_PRODUCTS, _INT8_PRODUCTS, _FLOAT_STATES = 0, 1, 2
_NOT_FINITE = 5


class CoreError(RuntimeError):
    """A function of the C core refused its arguments or data."""

    def __init__(self, function: str, status: int, text: str) -> None:
        super().__init__(f"lobcq_{function}: {text}")
        self.status = status


class Core:
    """The loaded shared library.

    Args:
        path: of the library.
        parallel_for: address of a `lobcq_parallel_for` function, or None to run on the calling thread. libtorch's
            `torch_parallel_for` is one: see `torch_parallel_for`.

    Raises:
        OSError: the library cannot be loaded, or has another ABI version.
        ConfigError: LOBCQ_CPU_ISA names no instruction set that this CPU runs (says which it does).
    """

    def __init__(self, path: Path, parallel_for: int | None = None) -> None:
        self.path = path
        self._lib = ctypes.CDLL(str(path))
        self.parallel_for = parallel_for
        for name in ("tables_bytes", "weight_bytes", "activation_bytes"):
            getattr(self._lib, f"lobcq_{name}").restype = ctypes.c_int64
        for name in ("isa", "status_text"):
            getattr(self._lib, f"lobcq_{name}").restype = ctypes.c_char_p
        version = self._lib.lobcq_abi_version()
        if version != ABI_VERSION:
            raise OSError(f"{path} has ABI version {version}, this package needs {ABI_VERSION}: rebuild it")
        if status := self._lib.lobcq_check_isa():
            raise ConfigError(self._lib.lobcq_status_text(status).decode())

    @property
    def isa(self) -> str:
        """The instruction set in use: "portable", "avx2", "avx512", "neon" or "neon_i8mm"."""
        return str(self._lib.lobcq_isa().decode())

    def register_torch_ops(self) -> None:
        """Register for CPU tensors, in C++, the ops that every step of a model calls. Once a process.

        They are the prepacked linears, dense and grouped, `lobcq::quantize_states`, `lobcq::attention` with its
        overload for floats, `lobcq::rms_norm` and `lobcq::rotate_half`.

        Raises:
            CoreError: this libtorch is older than 2.10, or has the ops already.
        """
        self._call("register_torch_ops", ctypes.c_void_p(_libtorch()._handle))

    def tables(self, codebooks: Tensor) -> Tables:
        """Tables of codebooks int8 [N_c, 16]."""
        codebooks = codebooks.contiguous()
        require("codebooks", codebooks, torch.int8, (codebooks.shape[0], CODEBOOK_SIZE))
        data = _buffer(self._lib.lobcq_tables_bytes())
        self._call("tables_init", _pointer(codebooks), codebooks.shape[0], _pointer(data))
        return Tables(data, codebooks.shape[0])

    def tensor_scale(self, x: Tensor) -> Tensor:
        """The weight rule's scale of x [R, K]: fp32 [].

        Raises:
            ValueError: x is not finite; names the first bad index.
        """
        scale = _floats(())
        bad = (ctypes.c_int64 * 2)()
        matrix = c_matrix(x)
        status = self._lib.lobcq_tensor_scale(ctypes.byref(matrix), _pointer(scale), bad)
        if status == _NOT_FINITE:
            raise ValueError(f"x[{bad[0]}, {bad[1]}] is {x[bad[0], bad[1]].item()}: a weight must be finite")
        self._check("tensor_scale", status)
        return scale

    def encode(self, tables: Tables, x: Tensor, array_size: int, tensor_scale: Tensor | None = None) -> PackedOperand:
        """Encode x [R, K] with a tensor scale [] or [R, 1], or (None) one computed for each row."""
        matrix = c_matrix(x)
        rows, columns = x.shape
        spec = FormatSpec(tables.num_codebooks, array_size)
        rule = _scale_rule(tensor_scale)
        scale = _floats((rows, 1)) if tensor_scale is None else tensor_scale.to(torch.float32).clone()
        packed = PackedOperand.empty(rows, columns, spec, scale.contiguous())
        out = c_packed(packed)
        self._call("encode", _pointer(tables.data), ctypes.byref(matrix), rule, ctypes.byref(out), self._parallel())
        return packed

    def encode_int8(self, x: Tensor, array_size: int, tensor_scale: Tensor | None = None) -> Int8Operand:
        """The same in int8."""
        matrix = c_matrix(x)
        scale = _floats((x.shape[0], 1)) if tensor_scale is None else tensor_scale.to(torch.float32).clone()
        operand = Int8Operand.empty(x.shape[0], x.shape[1], array_size, scale.contiguous())
        out = c_int8(operand)
        self._call("encode_int8", ctypes.byref(matrix), _scale_rule(tensor_scale), ctypes.byref(out), self._parallel())
        return operand

    def rotate(self, x: Tensor, array_size: int) -> Tensor:
        """x [R, K] with each block array rotated, fp32."""
        out = _floats(tuple(x.shape))
        matrix, result = c_matrix(x), c_matrix(out)
        self._call("rotate", ctypes.byref(matrix), array_size, ctypes.byref(result), self._parallel())
        return out

    def encode_searched(self, tables: Tables, x: Tensor, array_size: int, tensor_scale: Tensor) -> PackedOperand:
        """Encode x [R, K] with one tensor scale [], and block-array scales that cost least among neighbours."""
        spec, (rows, columns) = FormatSpec(tables.num_codebooks, array_size), x.shape
        packed = PackedOperand.empty(rows, columns, spec, tensor_scale.to(torch.float32).clone())
        matrix, out = c_matrix(x), c_packed(packed)
        self._call("encode_searched", _pointer(tables.data), ctypes.byref(matrix), ctypes.byref(out), self._parallel())
        return packed

    def compensate(
        self, tables: Tables, weight: Tensor, other_errors: Tensor, coupling: Tensor, power: Tensor,
        tensor_scale: float, array_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Round a weight [N, K] with feedback: `lobcq::compensate`, with E4M3 scales as uint8 bytes."""
        rows, columns = weight.shape
        if columns % array_size:
            raise ValueError(f"{columns} columns are not whole block arrays of {array_size}")
        inputs = tuple(operand.contiguous() for operand in (weight, other_errors, coupling, power))
        shapes = ((rows, columns), (rows, columns), (columns, columns), (columns,))
        for operand, shape in zip(inputs, shapes, strict=True):
            require("an operand", operand, torch.float32, shape)
        panels = coupling.reshape(columns, columns // COUPLING_PANEL, COUPLING_PANEL).transpose(0, 1).contiguous()
        widths = (columns, columns // BLOCK_SIZE, columns // array_size)
        codes, selectors, scales = (torch.empty((rows, n), dtype=torch.uint8, device="cpu") for n in widths)
        errors, costs = _floats((rows, columns)), torch.empty((rows, 2), dtype=torch.float64, device="cpu")
        feedback = CFeedback(
            *(part.data_ptr() for part in (*inputs[:2], panels, inputs[3], codes, selectors, scales, errors, costs)),
            rows, columns, array_size, tensor_scale,
        )  # fmt: skip
        self._call("compensate", _pointer(tables.data), ctypes.byref(feedback), self._parallel())
        return codes, selectors, scales, costs

    def decode(self, tables: Tables, packed: PackedOperand) -> Tensor:
        """The operand's values, fp32 [R, K]."""
        out = _floats((packed.codes.shape[0], packed.columns))
        matrix, operand = c_matrix(out), c_packed(packed)
        self._call("decode", _pointer(tables.data), ctypes.byref(operand), ctypes.byref(matrix), self._parallel())
        return out

    def squares(self, tables: Tables, x: Tensor, packed: PackedOperand) -> Tensor:
        """Of each row of x [R, K] the sums of its squares and of those of its distances from `packed`, fp64 [R, 2]."""
        sums = torch.empty((x.shape[0], 2), dtype=torch.float64, device="cpu")
        matrix, operand = c_matrix(x), c_packed(packed)
        self._call(
            "squares", _pointer(tables.data), ctypes.byref(matrix), ctypes.byref(operand), _pointer(sums),
            self._parallel(),
        )  # fmt: skip
        return sums

    def pack_weight(self, packed: PackedOperand) -> KernelWeight:
        """Kernel layout of a packed weight [N, K] with one tensor scale."""
        rows, spec = packed.codes.shape[0], packed.spec
        size = self._weight_bytes(rows, packed.columns, spec)
        weight = KernelWeight(_buffer(size), rows, packed.columns, spec, float(packed.tensor_scale))
        operand, out = c_packed(packed), c_weight(weight)
        self._call("weight_pack", ctypes.byref(operand), ctypes.byref(out), self._parallel())
        return weight

    def unpack_weight(self, weight: KernelWeight) -> PackedOperand:
        """The packed bytes that `pack_weight` was given."""
        self._check_weight(weight)
        scale = _floats(()).fill_(weight.tensor_scale)
        packed = PackedOperand.empty(weight.rows, weight.columns, weight.spec, scale)
        source, out = c_weight(weight), c_packed(packed)
        self._call("weight_unpack", ctypes.byref(source), ctypes.byref(out), self._parallel())
        return packed

    def encode_activation(
        self,
        tables: Tables | None,
        x: Tensor,
        array_size: int,
        tensor_scale: Tensor | None = None,
        rotated: bool = False,
    ) -> KernelActivation:
        """Encode x [M, K] for W4A4 linears, tensor scales as in `encode`; without tables in int8, for W4A8 ones.

        rotated: `rotate(x)` in place of x.
        """
        rule = _scale_rule(tensor_scale)
        scale = None if tensor_scale is None else tensor_scale.to(torch.float32).contiguous()
        if scale is not None:
            require("tensor_scale", scale, torch.float32, (), (x.shape[0], 1))
        matrix = c_matrix(x)
        activation = self._new_activation(x.shape[0], x.shape[1], array_size, _INT8 if tables is None else _ENCODED)
        out = c_activation(activation)
        self._call(
            "activation_encode", None if tables is None else _pointer(tables.data), ctypes.byref(matrix), rule,
            None if scale is None else _pointer(scale), int(rotated), ctypes.byref(out), self._parallel(),
        )  # fmt: skip
        return activation

    def load_activation(self, tables: Tables, packed: PackedOperand) -> KernelActivation:
        """An activation from its packed bytes."""
        activation = self._new_activation(packed.codes.shape[0], packed.columns, packed.spec.array_size, _ENCODED)
        operand, out = c_packed(packed), c_activation(activation)
        self._call("activation_load", _pointer(tables.data), ctypes.byref(operand), ctypes.byref(out), self._parallel())
        return activation

    def load_int8_activation(self, operand: Int8Operand) -> KernelActivation:
        """An activation from what `encode_int8` gives."""
        activation = self._new_activation(operand.entries.shape[0], operand.columns, operand.array_size, _INT8)
        source, out = c_int8(operand), c_activation(activation)
        self._call("activation_load_int8", ctypes.byref(source), ctypes.byref(out), self._parallel())
        return activation

    def split_activation(self, x: Tensor, array_size: int) -> KernelActivation:
        """The float values of x [M, K], for W4A16 linears."""
        matrix = c_matrix(x)
        activation = self._new_activation(x.shape[0], x.shape[1], array_size, _FLOAT)
        out = c_activation(activation)
        self._call("activation_split", ctypes.byref(matrix), ctypes.byref(out), self._parallel())
        return activation

    def linear(
        self,
        tables: Tables,
        weight: KernelWeight,
        activation: KernelActivation,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """`activation @ weight.T + bias` in `dtype` [M, N]; bias fp32 [N]; tables of the weight's codebooks."""
        out = torch.empty((activation.rows, weight.rows), dtype=dtype, device="cpu")
        matrix, w, a = c_matrix(out), c_weight(weight), c_activation(activation)
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        if bias is not None:
            require("bias", bias, torch.float32, (weight.rows,))
        self._check_weight(weight)
        product = CProduct(
            tables.data.data_ptr(), ctypes.pointer(w), weight.tensor_scale,
            None if bias is None else bias.data_ptr(), ctypes.pointer(matrix),
        )  # fmt: skip
        self._call("linear", ctypes.byref(product), ctypes.c_int64(1), ctypes.byref(a), self._parallel())
        return out

    def gather_activation(self, activation: KernelActivation, rows: Tensor) -> KernelActivation:
        """An activation of the rows that int64 [S] names."""
        require("rows", rows, torch.int64, (rows.numel(),))
        gathered = self._new_activation(rows.numel(), activation.columns, activation.array_size, activation.kind)
        source, out = c_activation(activation), c_activation(gathered)
        self._call("activation_gather", ctypes.byref(source), _pointer(rows), ctypes.byref(out), self._parallel())
        return gathered

    def grouped_linear(
        self, tables: Tables, weights: Sequence[KernelWeight], groups: Sequence[range], activation: KernelActivation
    ) -> list[Tensor]:
        """For each weight the product with its group of the activation's rows, fp32 [rows, N]."""
        pairs = list(zip(weights, groups, strict=True))
        results = [_floats((len(rows), weight.rows)) for weight, rows in pairs]
        matrices, stored = [c_matrix(one) for one in results], [c_weight(weight) for weight in weights]
        products = (CProduct * len(pairs))()
        for index, (weight, _) in enumerate(pairs):
            self._check_weight(weight)
            products[index] = CProduct(
                tables.data.data_ptr(), ctypes.pointer(stored[index]), weight.tensor_scale, None,
                ctypes.pointer(matrices[index]),
            )  # fmt: skip
        first_rows = (ctypes.c_int64 * len(pairs))(*(rows.start for _, rows in pairs))
        operand = c_activation(activation)
        self._call(
            "grouped_linear", products, first_rows, ctypes.c_int64(len(pairs)), ctypes.byref(operand), self._parallel()
        )
        return results

    def encode_states(self, tables: Tables, x: Tensor, array_size: int) -> Tensor:
        """Keys or values [B, H, T, D], contiguous, as rows of a cache, uint8 [B, T, row_bytes]."""
        require("x", x, x.dtype, tuple(x.shape))
        batch, heads, tokens, width = x.shape
        layout = StateRows(FormatSpec(tables.num_codebooks, array_size), heads, width)
        rows = torch.empty((batch, tokens, layout.row_bytes), dtype=torch.uint8, device="cpu")
        states = CNewStates(
            x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()[:3]), rows.data_ptr(), layout.row_bytes, batch, heads,
            tokens, width, DTYPES[x.dtype], array_size,
        )  # fmt: skip
        self._call("encode_states", _pointer(tables.data), ctypes.byref(states), self._parallel())
        return rows

    def attention(
        self,
        tables: Tables,
        query: Tensor,
        keys: tuple[Tensor, StateRows],
        values: tuple[Tensor, StateRows],
        mask: Tensor | None,
        scale: float,
        in_int8: bool = False,
    ) -> Tensor:
        """Attention over cached states: [B, Hq, T, width of a value] in the query's dtype.

        Args:
            tables: of the states' codebooks.
            query: [B, Hq, T, width of a key], contiguous.
            keys, values: rows uint8 [B, P, row_bytes], and how they are laid out.
            mask: bool, or added to the scores, [B, Hq, T, P], any strides; or None.
            scale: of the scores.
            in_int8: whether its products are of integers.
        """
        require("query", query, query.dtype, (*query.shape[:3], keys[1].width))
        states = (c_states(*keys), c_states(*values))
        products = _INT8_PRODUCTS if in_int8 else _FLOAT_PRODUCTS
        return self._attend(tables, query, states, (keys[1].heads, keys[0].shape[1]), mask, scale, products)

    def float_attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """The same over keys and values as floats, [B, H, P, D], any strides but that of the last dimension."""
        states = (c_float_states(key), c_float_states(value))
        require("query", query, query.dtype, (*query.shape[:3], key.shape[3]))
        return self._attend(None, query, states, (key.shape[1], key.shape[2]), mask, scale, _FLOAT_STATES)

    def _attend(
        self, tables: Tables | None, query: Tensor, states: tuple[CStates, CStates], heads_and_tokens: tuple[int, int],
        mask: Tensor | None, scale: float, products: int,
    ) -> Tensor:  # fmt: skip
        (batch, query_heads, queries), (heads, tokens) = query.shape[:3], heads_and_tokens
        out = torch.empty((batch, query_heads, queries, states[1].width), dtype=query.dtype, device="cpu")
        strides: tuple[int, ...] = (0, 0, 0, 0)
        address, kind, mask_dtype = None, _NO_MASK, 0
        if mask is not None:
            if tuple(mask.shape) != (batch, query_heads, queries, tokens):
                raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}")
            added = mask.dtype != torch.bool
            strides, address, kind = mask.stride(), mask.data_ptr(), _ADDED_MASK if added else _BOOL_MASK
            mask_dtype = DTYPES[mask.dtype] if added else 0
        operands = CAttention(
            query.data_ptr(), (ctypes.c_int64 * 3)(*query.stride()[:3]), *states, address,
            (ctypes.c_int64 * 4)(*strides), out.data_ptr(), (ctypes.c_int64 * 3)(*out.stride()[:3]),
            batch, query_heads, queries, heads, tokens, scale, DTYPES[query.dtype], kind, mask_dtype, products,
        )  # fmt: skip
        given = None if tables is None else _pointer(tables.data)
        self._call("attend", given, ctypes.byref(operands), self._parallel())
        return out

    def _weight_bytes(self, rows: int, columns: int, spec: FormatSpec) -> int:
        sizes = (ctypes.c_int64(rows), ctypes.c_int64(columns), spec.num_codebooks, spec.array_size)
        return int(self._lib.lobcq_weight_bytes(*sizes))

    def _check_weight(self, weight: KernelWeight) -> None:
        size = self._weight_bytes(weight.rows, weight.columns, weight.spec)
        require("the weight in kernel layout", weight.data, torch.uint8, (size,))

    def _new_activation(self, rows: int, columns: int, array_size: int, kind: int) -> KernelActivation:
        size = self._lib.lobcq_activation_bytes(ctypes.c_int64(rows), ctypes.c_int64(columns), array_size, kind)
        return KernelActivation(_buffer(size), rows, columns, array_size, kind)

    def _parallel(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.parallel_for)

    def _call(self, function: str, *arguments: object) -> None:
        self._check(function, getattr(self._lib, f"lobcq_{function}")(*arguments))

    def _check(self, function: str, status: int) -> None:
        if status:
            raise CoreError(function, status, self._lib.lobcq_status_text(status).decode())


def torch_parallel_for() -> int | None:
    """Address of libtorch's parallel_for, which obeys torch.set_num_threads."""
    return ctypes.cast(_libtorch().torch_parallel_for, ctypes.c_void_p).value


def _libtorch() -> ctypes.CDLL:
    """The library that `import torch` loaded, so that its symbols can be looked up."""
    return ctypes.CDLL(next(str(path) for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")))


def _floats(shape: tuple[int, ...]) -> Tensor:
    """Room for what the core writes as fp32, whatever the default dtype is."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _buffer(size: int) -> Tensor:
    if size < 0:
        raise ValueError("the core does not support this shape or format")
    data = torch.empty(size, dtype=torch.uint8, device="cpu")
    if data.data_ptr() % ALIGNMENT:
        padded = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
        data = padded[-padded.data_ptr() % ALIGNMENT :][:size]
    return data


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _scale_rule(tensor_scale: Tensor | None) -> int:
    if tensor_scale is None:
        return _ABSMAX_SCALES
    return _SHARED_SCALE if tensor_scale.dim() == 0 else _ROW_SCALES
