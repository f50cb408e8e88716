"""What each operand of the `lobcq::` ops has to be: one table, which `operand_checks` checks by.

The C++ core has the rows of `lobcq::linear_prepacked` in `torch_operands.h`; tests break each row in turn and hold all
implementations to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType

import torch

from lobcq_fx.format.spec import CODEBOOK_SIZE
from lobcq_fx.ops import schemas

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32, UINT8, INT8, E4M3 = (torch.float32,), (torch.uint8,), (torch.int8,), (torch.float8_e4m3fn,)
INT32, INT64 = (torch.int32,), (torch.int64,)


@dataclass(frozen=True)
class Operand:
    """One row of the table.

    shape: sizes, or names of sizes, `x.0` that of x's first dimension, with ` or 1` one that may be repeated; `...`
        stands for the activation's leading dimensions.
    like: the argument whose dtype the operand has; in place of `dtypes`.
    contiguous: whether kernels are given its address alone, not its strides.
    or_empty: in a list, [0] in any of the float dtypes stands for none.
    positive: its one number is positive and finite. On a GPU that is not looked at, which would wait for it.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int | str | EllipsisType, ...]
    like: str | None = None
    contiguous: bool = False
    or_empty: bool = False
    positive: bool = False

    @property
    def opaque(self) -> bool:
        """Whether a device lays it out: what it looks like is known where that is."""
        return self.shape in (("table_bytes",), ("weight_bytes",))


_WEIGHT = (
    Operand("w_codes", UINT8, ("N", "w_code_bytes")),
    Operand("w_selectors", UINT8, ("N", "w_selector_bytes")),
    Operand("w_scales", E4M3, ("N", "w_arrays")),
    Operand("w_tensor_scale", FLOAT32, ()),
    Operand("w_codebooks", INT8, ("N_c", CODEBOOK_SIZE)),
    Operand("bias", FLOATS, ("N",)),
)
_ACTIVATION_SCALES = (Operand("scales", E4M3, (..., "arrays")), Operand("tensor_scale", FLOAT32, (..., 1)))
_STACK = (
    Operand("w_codes", UINT8, ("E", "N", "w_code_bytes")),
    Operand("w_selectors", UINT8, ("E", "N", "w_selector_bytes")),
    Operand("w_scales", E4M3, ("E", "N", "w_arrays")),
    Operand("w_tensor_scale", FLOAT32, ("E",)),
    Operand("w_codebooks", INT8, ("N_c", CODEBOOK_SIZE)),
)
_GROUPS = (Operand("offsets", INT32, ("E",), contiguous=True), Operand("rows", INT64, ("S",), contiguous=True))
_X = Operand("x", FLOATS, (..., "K"))
_CODEBOOKS = Operand("codebooks", INT8, ("N_c", CODEBOOK_SIZE))
_W = (Operand("w", FLOATS, ("N", "K")), _CODEBOOKS)
_STATIC_SCALE = Operand("static_scale", FLOAT32, (), contiguous=True, positive=True)
_TABLES = Operand("activation_tables", UINT8, ("table_bytes",), contiguous=True)
_PREPACKED = (
    Operand("weight_tables", UINT8, ("table_bytes",), contiguous=True),  # say in which format the weights are
    Operand("weights", UINT8, ("weight_bytes",), contiguous=True),
    Operand("tensor_scales", FLOAT32, (), contiguous=True),
    Operand("biases", FLOATS, ("N",), contiguous=True, or_empty=True),
)
_PREPACKED_STACK = (
    Operand("weight_tables", UINT8, ("table_bytes",), contiguous=True),
    Operand("weights", UINT8, ("E", "weight_bytes"), contiguous=True),
    Operand("tensor_scales", FLOAT32, ("E",), contiguous=True),
    *_GROUPS,
)
_ENCODED = (_TABLES, _STATIC_SCALE, *_PREPACKED)
_RESIDUALS = Operand("residuals", (), (..., "N"), like="dtype", or_empty=True)
_NORM_WEIGHT, _NORM_BIAS = Operand("norm_weight", FLOATS, ("K",)), Operand("norm_bias", FLOATS, ("K",))

OPERANDS: dict[str, tuple[Operand, ...]] = {
    schemas.QUANTIZE_ACTIVATION: (_X, _CODEBOOKS, _STATIC_SCALE),
    schemas.QUANTIZE_ACTIVATION_INT8: (_X, _STATIC_SCALE),
    schemas.ROTATE: (_X,),
    schemas.QUANTIZE_WEIGHT: _W,
    schemas.QUANTIZE_WEIGHT_SEARCHED: _W,
    schemas.DEQUANTIZE_WEIGHT: _WEIGHT[:-1],
    schemas.WEIGHT_SQUARES: (Operand("w", FLOATS, ("N", "K")), *_WEIGHT[:-1]),
    schemas.COMPENSATE: (
        Operand("weight", FLOAT32, ("N", "K")),
        Operand("other_errors", FLOAT32, (..., "K")),
        Operand("coupling", FLOAT32, ("K", "K")),
        Operand("power", FLOAT32, ("K",)),
        Operand("tensor_scale", FLOAT32, (), positive=True),
        _CODEBOOKS,
    ),
    schemas.QUANTIZE_STATES: (Operand("x", FLOATS, ("B", "H", "T", "D")), _CODEBOOKS),
    schemas.DEQUANTIZE_STATES: (Operand("rows", UINT8, ("B", "T", "row_bytes")), _CODEBOOKS),
    schemas.ATTENTION: (
        Operand("query", FLOATS, ("B", "H", "T", "D")),
        Operand("keys", UINT8, ("batch", "P", "key_row_bytes")),
        Operand("values", UINT8, ("batch", "tokens", "value_row_bytes")),
        _CODEBOOKS,
        Operand("mask", (torch.bool, *FLOATS), ("batch or 1", "query_heads or 1", "queries or 1", "tokens or 1")),
    ),
    schemas.ATTENTION_FLOAT_STATES: (
        Operand("query", FLOATS, ("B", "H", "T", "D")),
        Operand("key", FLOATS, ("query.0", "S", "P", "query.3"), like="query"),
        Operand("value", FLOATS, ("query.0", "key.1", "key.2", "S"), like="query"),
        Operand("mask", (torch.bool, *FLOATS), ("batch or 1", "query_heads or 1", "queries or 1", "tokens or 1")),
    ),
    schemas.RMS_NORM: (_X, Operand("weight", FLOATS, ("K",))),
    schemas.ROTATE_HALF: (
        Operand("x", FLOATS, ("B", "H", "T", "D")),
        Operand("cos", FLOATS, ("x.0 or 1", "x.1 or 1", "x.2 or 1", "x.3")),
        Operand("sin", FLOATS, ("x.0 or 1", "x.1 or 1", "x.2 or 1", "x.3")),
    ),
    schemas.SELECTIVE_SCAN: (
        Operand("x", FLOAT32, ("B", "H", "T")),
        Operand("dt", FLOAT32, ("x.0", "x.1", "x.2")),
        Operand("A", FLOAT32, ("x.1", "S")),
        Operand("B", FLOAT32, ("x.0", "x.2", "A.1")),
        Operand("C", FLOAT32, ("x.0", "x.2", "A.1")),
        Operand("state", FLOAT32, ("x.0", "x.1", "A.1")),
    ),
    schemas.CHUNK_SCAN: (
        Operand("x", FLOAT32, ("B", "T", "H", "D")),
        Operand("dt", FLOAT32, ("x.0", "x.1", "x.2")),
        Operand("A", FLOAT32, ("x.2",)),
        Operand("B", FLOAT32, ("x.0", "x.1", "P", "S")),
        Operand("C", FLOAT32, ("x.0", "x.1", "B.2", "B.3")),
        Operand("state", FLOAT32, ("x.0", "x.2", "x.3", "B.3")),
    ),
    schemas.GATED_DELTA_RULE: (
        Operand("query", FLOAT32, ("B", "H", "T", "D")),
        Operand("key", FLOAT32, ("query.0", "query.1", "query.2", "query.3")),
        Operand("value", FLOAT32, ("query.0", "query.1", "query.2", "S")),
        Operand("decay", FLOAT32, ("query.0", "query.1", "query.2")),
        Operand("beta", FLOAT32, ("query.0", "query.1", "query.2")),
        Operand("state", FLOAT32, ("query.0", "query.1", "query.3", "value.3")),
    ),
    schemas.LINEAR: (
        Operand("codes", UINT8, (..., "code_bytes")),
        Operand("selectors", UINT8, (..., "selector_bytes")),
        *_ACTIVATION_SCALES,
        _CODEBOOKS,
        *_WEIGHT,
    ),
    schemas.LINEAR_FLOAT_ACTIVATION: (_X, *_WEIGHT),
    schemas.LINEAR_INT8_ACTIVATION: (
        Operand("entries", INT8, (..., "padded_columns")),
        *_ACTIVATION_SCALES,
        *_WEIGHT,
    ),
    schemas.GROUPED_LINEAR: (
        Operand("codes", UINT8, (..., "code_bytes")),
        Operand("selectors", UINT8, (..., "selector_bytes")),
        *_ACTIVATION_SCALES,
        _CODEBOOKS,
        *_STACK,
        *_GROUPS,
    ),
    schemas.GROUPED_LINEAR_FLOAT_ACTIVATION: (_X, *_STACK, *_GROUPS),
    schemas.GROUPED_LINEAR_INT8_ACTIVATION: (
        Operand("entries", INT8, (..., "padded_columns")),
        *_ACTIVATION_SCALES,
        *_STACK,
        *_GROUPS,
    ),
    schemas.GROUPED_LINEAR_PREPACKED: (_X, _TABLES, _STATIC_SCALE, *_PREPACKED_STACK),
    schemas.GROUPED_LINEAR_PREPACKED_FLOAT_ACTIVATION: (_X, *_PREPACKED_STACK),
    schemas.LINEAR_PREPACKED: (_X, *_ENCODED),
    schemas.LINEAR_PREPACKED_FLOAT_ACTIVATION: (_X, *_PREPACKED),
    schemas.LINEAR_PREPACKED_RESIDUAL: (_X, *_ENCODED, _RESIDUALS),
    schemas.LINEAR_PREPACKED_FLOAT_ACTIVATION_RESIDUAL: (_X, *_PREPACKED, _RESIDUALS),
    schemas.LINEAR_PREPACKED_SILU_MUL: (
        Operand("gate", FLOATS, (..., "K")),
        Operand("up", (), (..., "K"), like="gate"),
        *_ENCODED,
        _RESIDUALS,
    ),
    schemas.LINEAR_PREPACKED_RMS_NORM: (_X, _NORM_WEIGHT, *_ENCODED),
    schemas.LINEAR_PREPACKED_ADD_RMS_NORM: (
        _X,
        Operand("residual", (), (..., "K"), like="x"),
        _NORM_WEIGHT,
        *_ENCODED,
    ),
    schemas.LINEAR_PREPACKED_LAYER_NORM: (_X, _NORM_WEIGHT, _NORM_BIAS, *_ENCODED),
}
"""By op; its activation comes first."""
