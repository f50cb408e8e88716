"""The operators of the ONNX domain `lobcq`, opset 1: names, inputs, outputs, attributes and types.

They mirror the torch ops of `lobcq_fx.ops.schemas` one to one; docs/onnx.md says what each computes.
"""

from __future__ import annotations

from typing import Any

from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

DOMAIN = "lobcq"
VERSION = 1

QUANTIZE_ACTIVATION = "QuantizeActivation"
QUANTIZE_ACTIVATION_INT8 = "QuantizeActivationInt8"
ROTATE = "Rotate"
LINEAR = "Linear"
LINEAR_INT8_ACTIVATION = "LinearInt8Activation"
LINEAR_FLOAT_ACTIVATION = "LinearFloatActivation"
GROUPED_LINEAR = "GroupedLinear"
GROUPED_LINEAR_INT8_ACTIVATION = "GroupedLinearInt8Activation"
GROUPED_LINEAR_FLOAT_ACTIVATION = "GroupedLinearFloatActivation"

Parameter = tuple[str, str]
"""A name and its type; a "?" behind the name means that it may be left out."""

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_UINT8, _INT8, _E4M3, _FLOAT = "tensor(uint8)", "tensor(int8)", "tensor(float8e4m3fn)", "tensor(float)"

PACKED: tuple[Parameter, ...] = (
    ("codes", _UINT8), ("selectors", _UINT8), ("scales", _E4M3), ("tensor_scale", _FLOAT)
)  # fmt: skip
"""A packed operand, in the order that all ops have its parts; the codebooks that decode it follow."""

INT8_ACTIVATION: tuple[Parameter, ...] = (("entries", _INT8), ("scales", _E4M3), ("tensor_scale", _FLOAT))
ACTIVATION: tuple[Parameter, ...] = (*PACKED, ("codebooks", _INT8))
WEIGHT: tuple[Parameter, ...] = tuple((f"w_{name}", kind) for name, kind in ACTIVATION)
BIAS: Parameter = ("bias?", _FLOAT)
GROUPS: tuple[Parameter, ...] = (("ends", "tensor(int32)"), ("rows", "tensor(int64)"))
"""Where groups of rows end, and which rows of the activation they are."""


def _schema(name: str, inputs: tuple[Parameter, ...], outputs: tuple[Parameter, ...], *attributes: str) -> OpSchema:
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[_formal(*parameter) for parameter in inputs],
        outputs=[_formal(*parameter) for parameter in outputs],
        type_constraints=[("T", _FLOATS, "")] if ("x", "T") in inputs else [],
        attributes=[OpSchema.Attribute(key, OpSchema.AttrType.INT, required=True) for key in attributes],
    )


def _formal(name: str, kind: str) -> OpSchema.FormalParameter:
    option = OpSchema.FormalParameterOption
    return OpSchema.FormalParameter(
        name.rstrip("?"), kind, param_option=option.Optional if name.endswith("?") else option.Single
    )


SCHEMAS: dict[str, OpSchema] = {
    schema.name: schema
    for schema in (
        _schema(
            QUANTIZE_ACTIVATION, (("x", "T"), ("codebooks", _INT8), ("static_scale?", _FLOAT)), PACKED, "array_size"
        ),
        _schema(QUANTIZE_ACTIVATION_INT8, (("x", "T"), ("static_scale?", _FLOAT)), INT8_ACTIVATION, "array_size"),
        _schema(ROTATE, (("x", "T"),), (("y", _FLOAT),), "array_size"),
        _schema(
            LINEAR,
            (*ACTIVATION, *WEIGHT, BIAS),
            (("y", _FLOAT),),
            "in_features",
            "array_size",
            "activation_array_size",
        ),
        _schema(
            LINEAR_INT8_ACTIVATION, (*INT8_ACTIVATION, *WEIGHT, BIAS), (("y", _FLOAT),), "in_features", "array_size"
        ),
        _schema(LINEAR_FLOAT_ACTIVATION, (("x", "T"), *WEIGHT, BIAS), (("y", "T"),), "array_size"),
        _schema(
            GROUPED_LINEAR,
            (*ACTIVATION, *WEIGHT, *GROUPS),
            (("y", _FLOAT),),
            "in_features",
            "array_size",
            "activation_array_size",
        ),
        _schema(
            GROUPED_LINEAR_INT8_ACTIVATION,
            (*INT8_ACTIVATION, *WEIGHT, *GROUPS),
            (("y", _FLOAT),),
            "in_features",
            "array_size",
        ),
        _schema(GROUPED_LINEAR_FLOAT_ACTIVATION, (("x", "T"), *WEIGHT, *GROUPS), (("y", "T"),), "array_size"),
    )
}


def operator(name: str) -> Any:
    """The operator as a function to call while torch.onnx translates: it adds a node to the graph."""
    return Op(Opset(DOMAIN, VERSION), name, SCHEMAS[name])
