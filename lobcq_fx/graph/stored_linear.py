"""Linears on stored weights as `Emit` writes them: the one place that reads that pattern back.

quantize_activation(x, ...) -> getitem x 4 -> lobcq::linear                        W4A4
quantize_activation_int8(x, ...) -> getitem x 3 -> lobcq::linear.int8_activation   W4A8
lobcq::linear.float_activation(x, ...)                                             W4A16

`lobcq::grouped_linear` and its overloads likewise: the experts of a mixture, whose weight is a stack.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import lobcq_fx.ops  # noqa: F401  (registers the ops)
from lobcq_fx.graph.attributes import named_arguments
from lobcq_fx.modules.packed_weight import PARTS

ops = torch.ops.lobcq

ENCODERS: dict[Any, Any] = {
    ops.linear.default: ops.quantize_activation.default,
    ops.linear.int8_activation: ops.quantize_activation_int8.default,
    ops.grouped_linear.default: ops.quantize_activation.default,
    ops.grouped_linear.int8_activation: ops.quantize_activation_int8.default,
}
"""Linears of encoded activations, and what encodes those for them."""

LINEARS = (*ENCODERS, ops.linear.float_activation, ops.grouped_linear.float_activation)


@dataclass(frozen=True)
class StoredLinear:
    """One call of an overload of `lobcq::linear`, or of `lobcq::grouped_linear`."""

    node: fx.Node

    @property
    def arguments(self) -> dict[str, Any]:
        """By the schema's names."""
        return named_arguments(self.node)

    @property
    def encodes_activation(self) -> bool:
        """Whether it multiplies an encoded activation (W4A4, W4A8)."""
        return self.node.target in ENCODERS

    @property
    def weight(self) -> str:
        """Name of the packed weight's module."""
        return str(self.arguments["w_codes"].target).removesuffix(".codes")

    @property
    def codebooks(self) -> fx.Node:
        """The weight's codebooks."""
        node: fx.Node = self.arguments["w_codebooks"]
        return node

    @property
    def weight_nodes(self) -> list[fx.Node]:
        """The weight's operands in the order the ops take them, codebooks last."""
        arguments = self.arguments
        return [arguments[f"w_{part}"] for part in (*PARTS, "codebooks")]

    @property
    def bias(self) -> fx.Node | None:
        """The bias operand, or None."""
        node: fx.Node | None = self.arguments.get("bias")
        return node

    @property
    def grouped(self) -> bool:
        """Whether its weight is a stack, each matrix of which meets rows of its own."""
        return "offsets" in self.arguments

    @property
    def groups(self) -> tuple[fx.Node | None, fx.Node | None]:
        """Where groups of rows end, and which rows they are of."""
        arguments = self.arguments
        return arguments["offsets"], arguments["rows"]

    @property
    def array_size(self) -> int:
        """L_A, of the weight."""
        size: int = self.arguments["array_size"]
        return size

    @property
    def kernel_array_size(self) -> int:
        """L_A that kernels multiply in: the shorter of the operands' arrays, which is the activation's."""
        size: int | None = self.arguments.get("activation_array_size")
        return self.array_size if size is None else size

    @property
    def encoder(self) -> fx.Node | None:
        """The node whose results it reads, encoded as it decodes them; None if it reads others."""
        if not self.encodes_activation:
            return None
        arguments, target = self.arguments, ENCODERS[self.node.target]
        parts = [arguments[result.name] for result in target._schema.returns]
        encoder = parts[0].args[0] if parts[0].target is operator.getitem else None
        if not isinstance(encoder, fx.Node) or encoder.target is not target:
            return None
        in_order = all(part.args == (encoder, i) for i, part in enumerate(parts))
        encoded = named_arguments(encoder)
        read = {"codebooks": arguments.get("codebooks"), "array_size": self.kernel_array_size}
        same = all(encoded[name] == read[name] for name in read if name in encoded)
        return encoder if in_order and same else None

    @property
    def activation(self) -> fx.Node | None:
        """The floats [..., K], rotated or not, behind its encoder if there is one; None where it reads others."""
        encoder = self.encoder
        if self.encodes_activation and encoder is None:
            return None
        node: fx.Node = (self.arguments if encoder is None else named_arguments(encoder))["x"]
        return node


def stored_linears(graph: fx.Graph) -> Iterator[StoredLinear]:
    """Those of a graph, in order; the graph may change on the way."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in LINEARS:
            yield StoredLinear(node)
