"""Pass: replace the matmuls of a model's second graph by those ops, on those packed weights, that the first one has.

linear(x, w, b)  ->  what `rewrite` put in the place of the same linear in the first graph; nothing is encoded
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import lobcq_fx.ops  # noqa: F401  (registers the ops that this pass reads and emits)
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import TraceError
from lobcq_fx.graph.attributes import add_call, get_attr_node, get_attribute, named_arguments
from lobcq_fx.graph.matmuls import Matmul, find_matmuls, module_path
from lobcq_fx.modules.packed_weight import PARTS, PackedWeight
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.passes.pack import erase_unread

ops = torch.ops.lobcq

LINEARS = (ops.linear.default, ops.linear.float_activation)


@dataclass(frozen=True)
class FollowRewrite(GraphPass):
    """Two traces of one model run the same matmuls in the same order: the n-th here becomes what the n-th there became.

    Args:
        first: the graph module after `Rewrite`, whose tensors the graph at hand shares.
        config: the settings of that `Rewrite`.
    """

    name: ClassVar[str] = "follow_rewrite"

    first: fx.GraphModule
    config: LobcqConfig

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Check every pair, then replace.

        Raises:
            TraceError: the graphs do not run the same matmuls; nothing was changed.
        """
        matmuls = {matmul.node: matmul for matmul in find_matmuls(graph_module, self.config)}
        here, there = _in_order(graph_module, self.config), _in_order(self.first, self.config)
        _check_layers(here, there)
        followed = [
            (matmuls[node], model)
            for node, model in zip(here, there, strict=True)
            if node in matmuls and model.target in LINEARS
        ]
        _check_weights(graph_module, followed)
        for matmul, model in followed:
            _replace(graph_module, matmul, model)
        for weight in {matmul.weight: None for matmul, _ in followed if matmul.weight is not None}:
            erase_unread(weight)
        return bool(followed)


def _check_layers(here: list[fx.Node], there: list[fx.Node]) -> None:
    """Both graphs run their matmuls in the same modules."""
    if len(here) != len(there):
        raise TraceError(f"it has {len(here)} matmuls, the graph that it follows {len(there)}")
    for node, model in zip(here, there, strict=True):
        if module_path(node) != module_path(model):
            path, wanted = module_path(node), module_path(model)
            raise TraceError(f"it runs a matmul in {path!r} where the graph that it follows runs one in {wanted!r}")


def _check_weights(graph_module: fx.GraphModule, followed: list[tuple[Matmul, fx.Node]]) -> None:
    """One packed weight for each float weight and the other way round, both of the same size."""
    packed_of: dict[tuple[str, bool, str], str] = {}
    for matmul, model in followed:
        packed = _weight_name(model)
        weight = get_attribute(graph_module, packed)
        assert isinstance(weight, PackedWeight)
        target = None if matmul.weight is None else str(matmul.weight.target)
        key = (str(target), matmul.flipped, matmul.config.format.name)
        same = packed_of.setdefault(key, packed) == packed and (weight.rows, weight.columns) == matmul.shape
        if target is None or not same:
            raise TraceError(f"its matmul in {matmul.layer} reads {target}, that of the graph it follows {packed}")
    if len(set(packed_of.values())) != len(packed_of):
        raise TraceError("two of its weights are one in the graph that it follows")


def _in_order(graph_module: fx.GraphModule, config: LobcqConfig) -> list[fx.Node]:
    """The matmuls of the graph, replaced ones and those left alone."""
    left = {matmul.node for matmul in find_matmuls(graph_module, config)}
    return [node for node in graph_module.graph.nodes if node in left or node.target in LINEARS]


def _weight_name(linear: fx.Node) -> str:
    return str(named_arguments(linear)["w_codes"].target).removesuffix(".codes")


def _replace(graph_module: fx.GraphModule, matmul: Matmul, model: fx.Node) -> None:
    """Put the op of `model` in the place of a matmul, with this graph's activation and bias."""
    graph, node, arguments = graph_module.graph, matmul.node, named_arguments(model)

    def here(there: fx.Node | None) -> fx.Node | None:
        return None if there is None else get_attr_node(graph_module, str(there.target))

    weight = [here(arguments[f"w_{part}"]) for part in (*PARTS, "codebooks")]
    with graph.inserting_before(node):
        if model.target is ops.linear.float_activation:
            args = (matmul.activation, *weight, matmul.bias, arguments["array_size"])
        else:
            encoder = named_arguments(arguments["codes"].args[0])
            codebooks = here(encoder["codebooks"])
            scale = here(encoder.get("static_scale"))
            call = (matmul.activation, codebooks, encoder["array_size"], scale)
            encoded = add_call(graph, ops.quantize_activation.default, call, like=node)
            parts = [add_call(graph, operator.getitem, (encoded, index), like=node) for index in range(len(PARTS))]
            tail = (matmul.bias, arguments["in_features"], arguments["array_size"], arguments["dtype"])
            args = (*parts, codebooks, *weight, *tail)
        replacement = add_call(graph, model.target, args, like=node)
    node.replace_all_uses_with(replacement)
    graph.erase_node(node)
