"""Passes for `target="matmulnbits"`: packed weights as ONNX Runtime's 8-bit MatMulNBits, activations in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from lobcq_fx.format import FormatSpec
from lobcq_fx.format.codes import entries_of
from lobcq_fx.format.packing import unpack_codes, unpack_selectors
from lobcq_fx.format.spec import BLOCK_SIZE
from lobcq_fx.graph.attributes import get_attribute, register_attribute
from lobcq_fx.graph.dead_code import erase_dead_nodes
from lobcq_fx.graph.stored_linear import StoredLinear, stored_linears
from lobcq_fx.passes.infra import GraphPass

ops = torch.ops.lobcq

OPERATOR = "com.microsoft::MatMulNBits"
ZERO_POINT = 128
"""MatMulNBits' default for 8 bits: what an entry of 0 is stored as."""


@dataclass(frozen=True)
class UseFloatActivations(GraphPass):
    """Put `linear.float_activation` in the place of every `linear`: the same weights, the activation as it was."""

    name: ClassVar[str] = "use_float_activations"

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Replace each; what encoded the activations then goes."""
        graph = graph_module.graph
        linears = [linear for linear in stored_linears(graph) if linear.encodes_activation]
        for linear in linears:
            assert linear.activation is not None, "an encoded activation comes from quantize_activation"
            packet = ops.grouped_linear if linear.grouped else ops.linear
            of_call = linear.groups if linear.grouped else (linear.bias,)
            args = (linear.activation, *linear.weight_nodes, *of_call, linear.array_size)
            with graph.inserting_before(linear.node):
                y = graph.call_function(packet.float_activation, args)
                y = graph.call_function(torch.ops.aten.to.dtype, (y, linear.arguments["dtype"]))
            linear.node.replace_all_uses_with(y)
            graph.erase_node(linear.node)
        if linears:
            erase_dead_nodes(graph)
        return bool(linears)


@dataclass(frozen=True)
class LowerToMatMulNBits(GraphPass):
    """Put MatMulNBits in the place of every `linear.float_activation`.

    Args:
        quantized: a module that holds the same weights, packed.
    """

    name: ClassVar[str] = "lower_to_matmulnbits"

    quantized: nn.Module

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Replace each, with its weight beside the packed one; that is left to `EliminateDeadCode`.

        Those of experts stay: the operator has no stacks of weights.
        """
        linears = [one for one in stored_linears(graph_module.graph) if not (one.encodes_activation or one.grouped)]
        for linear in linears:
            self._lower(graph_module, linear)
        if linears:
            erase_dead_nodes(graph_module.graph)
        return bool(linears)

    def _lower(self, graph_module: fx.GraphModule, linear: StoredLinear) -> None:
        graph, name = graph_module.graph, linear.weight
        codes, selectors, scales, tensor_scale, codebooks = linear.weight_nodes
        parts = [get_attribute(graph_module, str(one.target)) for one in (codes, selectors, scales, codebooks)]
        blocks, block_scales = integer_weight(*parts, array_size=linear.array_size)
        columns = get_attribute(self.quantized, name).columns
        with graph.inserting_before(linear.node):
            stored = []
            for key, tensor in ((f"{name}.blocks", blocks), (f"{name}.block_scales", block_scales)):
                register_attribute(graph_module, key, tensor)
                stored.append(graph.get_attr(key))
            y = graph.call_function(matmul_nbits, (linear.activation, *stored, columns))
            y = graph.call_function(torch.ops.aten.mul.Tensor, (y, tensor_scale))
            if linear.bias is not None:
                y = graph.call_function(torch.ops.aten.add.Tensor, (y, linear.bias))
        linear.node.replace_all_uses_with(y)
        graph.erase_node(linear.node)


def integer_weight(
    codes: Tensor, selectors: Tensor, scales: Tensor, codebooks: Tensor, *, array_size: int
) -> tuple[Tensor, Tensor]:
    """The weight over its tensor scale as MatMulNBits stores it: uint8 [N, Kp / L_A, L_A], entry plus 128, and fp32
    [N, Kp / L_A]. Both are exact; scales times the tensor scale, rounded, would not be.
    """
    spec = FormatSpec(codebooks.shape[0], array_size)
    unpacked = unpack_codes(codes)
    chosen = unpack_selectors(selectors, spec.selector_bits, unpacked.shape[1] // BLOCK_SIZE)
    entries = entries_of(unpacked, chosen, codebooks).to(torch.int16)
    return (entries + ZERO_POINT).to(torch.uint8).view(*scales.shape, array_size), scales.float()


def matmul_nbits(x: Tensor, blocks: Tensor, scales: Tensor, columns: int) -> Tensor:
    """One node of ONNX Runtime's operator: x [..., columns] times a weight [N, columns], all in fp32."""
    rows, _, array_size = blocks.shape
    attributes: dict[str, Any] = {"K": columns, "N": rows, "bits": 8, "block_size": array_size}
    y: Tensor = torch.onnx.ops.symbolic(
        OPERATOR,
        (x, blocks, scales),
        attributes,
        dtype=x.dtype,
        shape=(*x.shape[:-1], rows),
        version=1,
    )
    return y
