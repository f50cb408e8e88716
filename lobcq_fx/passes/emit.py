"""Pass: replace matmuls with constant weights by LO-BCQ ops, as planned, on weights that are encoded already.

linear(x, w, b)  ->  lobcq::linear(*lobcq::quantize_activation(x), *packed w, b)                         W4A4
linear(x, w, b)  ->  lobcq::linear.int8_activation(*lobcq::quantize_activation_int8(x), *packed w, b)    W4A8
linear(x, w, b)  ->  lobcq::linear.float_activation(x, *packed w, b)                                     W4A16

Where the graph module has a matmul's input scale, x is multiplied with it; where it is to be rotated, `lobcq::rotate`
follows.
"""

from __future__ import annotations

import operator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import lobcq_fx.ops  # noqa: F401  (registers the ops that this pass emits)
from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.graph.aliasing import written_between
from lobcq_fx.graph.attributes import add_call, get_attr_node, has_attribute
from lobcq_fx.graph.dispatch import before_dispatch
from lobcq_fx.graph.matmuls import Matmul
from lobcq_fx.graph.operands import erase_unread
from lobcq_fx.graph.stored_linear import ENCODERS
from lobcq_fx.modules.packed_weight import PARTS
from lobcq_fx.passes.infra import Condition, GraphPass
from lobcq_fx.passes.insert_observers import unobserved
from lobcq_fx.passes.normalize_matmuls import normal_form
from lobcq_fx.plan import PlannedMatmul, QuantizationPlan

aten = torch.ops.aten
ops = torch.ops.lobcq


Prepared = dict[tuple[fx.Node, str | None, int, bool], fx.Node]
"""Activations as they are read, by what they were, the scale that they got, the rotation, and whether in float."""


@dataclass(frozen=True)
class Emit(GraphPass):
    """Write the ops of the format into a graph. Nothing is encoded; several graphs can be on the same tensors.

    Args:
        plan: made of this graph, or of another that runs the same matmuls.
        codebooks: the sets that weights and activations are encoded with, registered in the graph module.
        rotated: the matmuls whose activations are to be rotated.
    """

    name: ClassVar[str] = "emit"
    requires: ClassVar[tuple[Condition, ...]] = (normal_form,)

    plan: QuantizationPlan
    codebooks: CodebookSets
    rotated: AbstractSet[PlannedMatmul] = frozenset()

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Check every matmul against the plan, then replace those that it quantizes.

        Raises:
            TraceError: the graph does not run the matmuls of the plan; nothing was changed.
        """
        pairs = [(matmul, planned) for matmul, planned in self.plan.pair(graph_module) if planned.weight is not None]
        prepared: Prepared = {}
        for matmul, planned in pairs:
            self._replace(graph_module, matmul, planned, prepared)
        for weight in dict.fromkeys(matmul.weight for matmul, _ in pairs):
            assert weight is not None
            erase_unread(weight)
        return bool(pairs)

    def _replace(
        self, graph_module: fx.GraphModule, matmul: Matmul, planned: PlannedMatmul, prepared: Prepared
    ) -> None:
        graph, node, spec, weight = graph_module.graph, matmul.node, planned.config.format, planned.weight
        assert weight is not None
        x = unobserved(graph_module, matmul.activation)
        packed = [get_attr_node(graph_module, f"{weight.stored}.{part}") for part in PARTS]
        packed.append(get_attr_node(graph_module, self.codebooks.name_of(self.codebooks.weights[spec])))
        with graph.inserting_before(node):
            packet: Any = ops.linear
            of_call: tuple[fx.Node | None, ...] = (matmul.bias,)
            if matmul.grouped:
                x, rows = before_dispatch(x, node)
                packet, of_call = ops.grouped_linear, (matmul.offsets, rows)
            x = self._prepared(graph_module, node, x, planned, prepared)
            if planned.config.mode == "w4a16":
                target, args = packet.float_activation, (x, *packed, *of_call, spec.array_size)
            else:
                target = packet.int8_activation if planned.config.mode == "w4a8" else packet.default
                encoded = self._encode_activation(graph_module, node, x, planned, ENCODERS[target])
                arrays = planned.config.activations.array_size
                tail = (*of_call, weight.columns, spec.array_size, node.meta["val"].dtype)
                others = () if arrays == spec.array_size else (arrays,)
                args = (*encoded, *packed, *tail, *others)
            replacement = add_call(graph, target, args, like=node)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)

    def _encode_activation(
        self, graph_module: fx.GraphModule, node: fx.Node, x: fx.Node, planned: PlannedMatmul, encoder: Any
    ) -> list[fx.Node]:
        """Nodes of the encoded activation's parts, and of its codebooks if it has any, at the insertion point."""
        graph, spec = graph_module.graph, planned.config.activations
        codebooks = []
        if encoder is ops.quantize_activation.default:
            codebooks = [get_attr_node(graph_module, self.codebooks.name_of(self.codebooks.activations[spec]))]
        scale = None if planned.static_scale is None else get_attr_node(graph_module, planned.static_scale)
        encoded = add_call(graph, encoder, (x, *codebooks, spec.array_size, scale), like=node)
        indices = range(len(encoder._schema.returns))
        return [*(add_call(graph, operator.getitem, (encoded, index), like=node) for index in indices), *codebooks]

    def _prepared(
        self,
        graph_module: fx.GraphModule,
        node: fx.Node,
        x: fx.Node,
        planned: PlannedMatmul,
        prepared: Prepared,
    ) -> fx.Node:
        """x scaled and rotated where it is to be, once for all that read one value of it; at the insertion point."""
        scale, rotated = planned.input_scale, planned in self.rotated
        if scale is not None and not has_attribute(graph_module, scale):
            scale = None
        if scale is None and not rotated:
            return x
        size = planned.config.activations.array_size if rotated else 0
        key = x, scale, size, planned.config.mode == "w4a16"
        if key not in prepared or written_between(prepared[key], node, [x]):
            y = x
            if scale is not None:
                y = add_call(graph_module.graph, aten.mul.Tensor, (y, get_attr_node(graph_module, scale)), like=node)
            prepared[key] = self._rotated(graph_module.graph, node, y, planned) if rotated else y
        return prepared[key]

    def _rotated(self, graph: fx.Graph, node: fx.Node, x: fx.Node, planned: PlannedMatmul) -> fx.Node:
        """x rotated, at the insertion point: in fp32 for an encoder; in x's dtype where it is multiplied as it is."""
        rotated = add_call(graph, ops.rotate.default, (x, planned.config.activations.array_size), like=node)
        if planned.config.mode != "w4a16":
            return rotated
        return add_call(graph, aten.to.dtype, (rotated, node.meta["val"].dtype), like=node)
