"""A function body under construction: standard ONNX ops, called like functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lobcq_fx.export.schemas import DOMAIN, SCHEMAS

OPSET = 21
"""Of the standard ops in function bodies and in exported graphs; ONNX Runtime has it since 1.20."""

FLOAT, INT8, INT32, INT64, UINT8, E4M3 = (
    int(kind)
    for kind in (
        ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8,
        ir.DataType.FLOAT8E4M3FN,
    )
)  # fmt: skip

Operand = ir.Value | int | float | Sequence[int] | np.ndarray | None
"""What an op takes: a value, or a constant (ints become int64, a float becomes fp32); None for an input left out."""


class Body:
    """Collects nodes: `op("Add", x, 1.0)` adds one and returns its output.

    Helpers that take a Body extend it; nothing is a nested function, through which ONNX Runtime passes no E4M3.
    """

    def __init__(self) -> None:
        self._tape = ir.tape.Tape()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """All nodes so far, in order."""
        return self._tape.nodes

    def __call__(self, op_type: str, *inputs: Operand, **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        return self._tape.op(op_type, [self._value(operand) for operand in inputs], attributes)

    def attribute(self, name: str) -> ir.Value:
        """An integer attribute of the function, as an int64 tensor [1]."""
        reference = ir.RefAttr("value_int", name, ir.AttributeType.INT)
        return self("Reshape", self._tape.op("Constant", [], {"value_int": reference}), [1])

    def _value(self, operand: Operand) -> ir.Value | None:
        if operand is None or isinstance(operand, ir.Value):
            return operand
        kind = np.float32 if isinstance(operand, float) else np.int64
        array = operand if isinstance(operand, np.ndarray) else np.array(operand, dtype=kind)
        return self._tape.op("Constant", [], {"value": ir.tensor(array)})


def function(name: str, build: Callable[..., Sequence[ir.Value]]) -> ir.Function:
    """The function body of an operator.

    Args:
        name: the operator's; its schema gives the inputs, outputs and attributes.
        build: called with a Body and a value for each input; returns a value for each output.
    """
    schema = SCHEMAS[name]
    op = Body()
    inputs = [ir.Value(name=parameter.name) for parameter in schema.inputs]
    outputs = build(op, *inputs)
    for value, parameter in zip(outputs, schema.outputs, strict=True):
        value.name = parameter.name
    graph = ir.Graph(inputs, outputs, nodes=op.nodes, opset_imports={"": OPSET})
    attributes = [ir.Attr(key, ir.AttributeType.INT, None) for key in schema.attributes]
    return ir.Function(DOMAIN, name, graph=graph, attributes=attributes)
