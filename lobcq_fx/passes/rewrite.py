"""Pass: replace matmuls with constant weights by LO-BCQ ops.

linear(x, w, b)  ->  lobcq::linear(*lobcq::quantize_activation(x), *packed w, b)     W4A4
linear(x, w, b)  ->  lobcq::linear.float_activation(x, *packed w, b)                 W4A16
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

import lobcq_fx.ops  # noqa: F401  (registers the ops that this pass emits)
from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.config import LobcqConfig
from lobcq_fx.format import encode, sqnr_db
from lobcq_fx.graph.attributes import (
    add_call,
    add_get_attr,
    free_name,
    get_attr_node,
    has_attribute,
    register_attribute,
)
from lobcq_fx.graph.matmuls import Matmul, find_matmuls
from lobcq_fx.graph.operands import operation_name
from lobcq_fx.inventory import MatmulRecord
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.passes.insert_observers import Observer, observer_of, scaled_sample
from lobcq_fx.passes.pack import Packed, erase_unread, pack_weight

ops = torch.ops.lobcq

# What a weight is packed for: its name, whether it is transposed, and the format.
WeightKey = tuple[str, bool, str]


@dataclass(frozen=True)
class Rewrite(GraphPass):
    """Encode constant weights and replace their matmuls.

    Args:
        config: what to quantize and how.
        codebooks: the sets to encode with.
        release_from: the float model, whose weights are freed one by one as they are encoded; None keeps them.
        progress: called with (weights encoded, weights in all).

    `records` is filled with every matmul of the graph in execution order, those left alone with the reason.
    """

    name: ClassVar[str] = "rewrite"

    config: LobcqConfig
    codebooks: CodebookSets
    release_from: nn.Module | None = None
    progress: Callable[[int, int], None] | None = None
    records: list[MatmulRecord] = field(default_factory=list, compare=False)

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Work through the weights one by one; each float weight is let go before the next one is encoded.

        Raises:
            LobcqError: a weight holds NaN or infinity (names the weight and the first bad index).
            CalibrationError: a static scale is wanted for a layer that saw no calibration data.
        """
        matmuls = find_matmuls(graph_module, self.config)
        groups: dict[WeightKey, list[Matmul]] = {}
        for matmul in matmuls:
            if matmul.refusal is None:
                assert matmul.weight is not None
                key = (str(matmul.weight.target), matmul.flipped, matmul.config.format.name)
                groups.setdefault(key, []).append(matmul)
        records = {matmul.node: matmul.left_alone() for matmul in matmuls if matmul.refusal is not None}
        for done, group in enumerate(groups.values(), start=1):
            spec = group[0].config.format
            codebooks = self.codebooks.weights[spec]
            codebooks_node = self._codebooks(graph_module, codebooks)
            packed = pack_weight(graph_module, group, codebooks, codebooks_node, self.release_from)
            for matmul in group:
                records[matmul.node] = self._replace(graph_module, matmul, packed, first=matmul is group[0])
            assert group[0].weight is not None
            erase_unread(group[0].weight)
            if self.progress is not None:
                self.progress(done, len(groups))
        self.records.extend(records[matmul.node] for matmul in matmuls)
        return bool(groups)

    def _replace(self, graph_module: fx.GraphModule, matmul: Matmul, packed: Packed, first: bool) -> MatmulRecord:
        """Replace one matmul; its weight's bytes are counted with the first that uses it."""
        graph, node, spec = graph_module.graph, matmul.node, matmul.config.format
        observer = observer_of(graph_module, matmul)
        x = matmul.activation if observer is None else matmul.activation.args[0]
        record = self._record(matmul, packed, observer, first)
        with graph.inserting_before(node):
            if matmul.config.mode == "w4a16":
                target, args = ops.linear.float_activation, (x, *packed.nodes, matmul.bias, spec.array_size)
            else:
                encoded = self._quantize_activation(graph_module, matmul, x, observer)
                tail = (matmul.bias, record.shape[1], spec.array_size, node.meta["val"].dtype)  # type: ignore[index]
                target, args = ops.linear.default, (*encoded, *packed.nodes, *tail)
            replacement = add_call(graph, target, args, like=node)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        return record

    def _quantize_activation(
        self, graph_module: fx.GraphModule, matmul: Matmul, x: object, observer: Observer | None
    ) -> tuple[fx.Node, ...]:
        """Nodes of the encoded activation's four parts and its codebooks, at the insertion point."""
        spec, graph = matmul.config.format, graph_module.graph
        codebooks = self._codebooks(graph_module, self.codebooks.activations[spec])
        static_scale = None
        if matmul.config.activation_scale == "static":
            assert observer is not None, "static scales need observers: run insert_observers and calibrate first"
            name = free_name(graph_module, matmul.layer, "activation_scale")
            scale = observer.statistics.static_tensor_scale()
            register_attribute(graph_module, name, scale.to(_device(graph_module)))
            static_scale = add_get_attr(graph_module, name)
        args = (x, codebooks, spec.array_size, static_scale)
        encoded = add_call(graph, ops.quantize_activation.default, args, like=matmul.node)
        parts = [add_call(graph, operator.getitem, (encoded, index), like=matmul.node) for index in range(4)]
        return (*parts, codebooks)

    def _codebooks(self, graph_module: fx.GraphModule, codebooks: Tensor) -> fx.Node:
        """The `get_attr` node of a codebook set, registered on first use beside the weights."""
        name = self.codebooks.name_of(codebooks)
        if not has_attribute(graph_module, name):
            register_attribute(graph_module, name, codebooks.to(_device(graph_module)))
        return get_attr_node(graph_module, name)

    def _record(self, matmul: Matmul, packed: Packed, observer: Observer | None, first: bool) -> MatmulRecord:
        return MatmulRecord(
            matmul.layer,
            operation_name(matmul.node),
            matmul.shape,
            format=matmul.config.format.name,
            mode=matmul.config.mode,
            float_bytes=packed.float_bytes if first else 0,
            packed_bytes=packed.packed_bytes if first else 0,
            weight_sqnr_db=packed.sqnr_db,
            activation_sqnr_db=self._activation_sqnr_db(matmul, observer),
        )

    def _activation_sqnr_db(self, matmul: Matmul, observer: Observer | None) -> float | None:
        """On the observer's sample, in the scales that the layer will use; None if nothing was observed."""
        if observer is None or not observer.statistics.seen or matmul.config.mode == "w4a16":
            return None
        sample = scaled_sample(observer.statistics, matmul.config)
        codebooks = self.codebooks.activations[matmul.config.format]
        unscaled = torch.ones((), dtype=torch.float32, device=sample.device)
        return sqnr_db(sample, encode(sample, matmul.config.format, codebooks, unscaled))


def _device(graph_module: fx.GraphModule) -> torch.device:
    """Where the model's weights are."""
    return next(chain(graph_module.parameters(), graph_module.buffers())).device
