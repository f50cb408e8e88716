"""Pass: put weights into a device's kernel layout, and linears of one activation into one call.

quantize_activation(x); linear(codes, ..., w_q); linear(codes, ..., w_k)  ->  linear_prepacked(x, [w_q, w_k])     W4A4
linear.float_activation(x, w_q); linear.float_activation(x, w_k)          ->  the same with `.float_activation`   W4A16
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

import lobcq_fx.ops  # noqa: F401  (registers the ops that this pass matches and emits)
from lobcq_fx.passes.aliasing import Writes
from lobcq_fx.passes.attributes import (
    add_call,
    add_get_attr,
    get_attr_node,
    get_attribute,
    has_attribute,
    named_arguments,
)
from lobcq_fx.passes.codebook_sets import MODULE
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.passes.packed_weight import PARTS, PREPACKED, PackedWeight, WeightLayout

ops = torch.ops.lobcq

NO_BIAS = f"{MODULE}.no_bias"
TABLES = "_tables"
"""What the name of a codebook set's look-up tables ends in."""


@dataclass(frozen=True)
class _Linear:
    """One linear of the graph. `shared` is equal for linears that one call can compute."""

    node: fx.Node
    weight: str
    bias: fx.Node | None
    shared: tuple[Any, ...]


@dataclass(frozen=True)
class Prepack(GraphPass):
    """Repack weights and replace their linears. What was stored is no longer in the graph; `restore_weights` undoes it.

    A linear whose bias is computed in the graph keeps the ops of the format, and so does every other that reads its
    weight: a call for several linears stands where the activation is known, and the bias may not be known there yet.
    So does one whose encoded activation is not the result of `quantize_activation`.

    Args:
        layout: of the device's kernels.
        stored: weights that another graph on the same tensors reads as they are stored; none is repacked.
    """

    name: ClassVar[str] = "prepack"

    layout: WeightLayout
    stored: frozenset[str] = frozenset()

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Replace linears group by group, at the place where their activation was encoded or first read."""
        groups: dict[tuple[Any, ...], list[_Linear]] = defaultdict(list)
        for linear in _linears(graph_module.graph):
            if linear.weight not in self.stored:
                groups[linear.shared].append(linear)
        weights = {linear.weight for group in groups.values() for linear in group}
        for name in sorted(weights):
            weight = get_attribute(graph_module, name)
            if weight.layout is None:  # another graph's run may have repacked it
                weight.repack(self.layout)
        for group in groups.values():
            self._replace(graph_module, group)
        if groups:
            _erase_unread(graph_module.graph)
        return bool(groups)

    def _replace(self, graph_module: fx.GraphModule, group: list[_Linear]) -> None:
        graph, first = graph_module.graph, group[0].node
        args: tuple[Any, ...]
        arguments = named_arguments(first)
        weights = [get_attribute(graph_module, linear.weight) for linear in group]
        rest = (
            [add_get_attr(graph_module, f"{linear.weight}.{PREPACKED}") for linear in group],
            [get_attr_node(graph_module, f"{linear.weight}.tensor_scale") for linear in group],
            self._tables(graph_module, arguments["w_codebooks"]),
            [self._bias(graph_module, linear.bias) for linear in group],
            [weight.rows for weight in weights],
            arguments["array_size"],
        )
        if first.target is ops.linear.default:
            place = _encoder(arguments)
            assert place is not None
            encoded = named_arguments(place)
            tables = self._tables(graph_module, encoded["codebooks"])
            target = ops.linear_prepacked.default
            args = (encoded["x"], tables, encoded.get("static_scale"), *rest, arguments["dtype"])
        else:
            place, target, args = first, ops.linear_prepacked.float_activation, (arguments["x"], *rest)
        with graph.inserting_before(place):
            call = add_call(graph, target, args, like=first)
            results = [add_call(graph, operator.getitem, (call, i), like=one.node) for i, one in enumerate(group)]
        for linear, result in zip(group, results, strict=True):
            linear.node.replace_all_uses_with(result)
            graph.erase_node(linear.node)

    def _tables(self, graph_module: fx.GraphModule, codebooks: fx.Node) -> fx.Node:
        name = f"{codebooks.target}{TABLES}"
        if not has_attribute(graph_module, name):
            tables = self.layout.tables(get_attribute(graph_module, str(codebooks.target)))
            _register_transient(graph_module, name, tables)
        return get_attr_node(graph_module, name)

    def _bias(self, graph_module: fx.GraphModule, bias: fx.Node | None) -> fx.Node:
        if bias is not None:
            return get_attr_node(graph_module, str(bias.target))
        if not has_attribute(graph_module, NO_BIAS):
            device = get_attribute(graph_module, MODULE).get_buffer("codebooks").device
            _register_transient(graph_module, NO_BIAS, torch.empty(0, device=device))
        return get_attr_node(graph_module, NO_BIAS)


def restore_weights(graph_module: fx.GraphModule) -> None:
    """Bring every weight back into the layout it is stored in, and drop what the kernels looked up.

    The graph is not changed: put back one that reads stored weights.
    """
    for module in graph_module.modules():
        if isinstance(module, PackedWeight) and module.layout is not None:
            module.restore()
    for name in [name for name, _ in graph_module.named_buffers() if name == NO_BIAS or name.endswith(TABLES)]:
        owner, _, last = name.rpartition(".")
        delattr(get_attribute(graph_module, owner), last)


def weights_as_stored(graph: fx.Graph) -> frozenset[str]:
    """The weights that the graph goes on reading as they are stored after `Prepack`."""
    return _candidates(graph)[1]


def _linears(graph: fx.Graph) -> list[_Linear]:
    """The linears that can be replaced, in order."""
    candidates, refused = _candidates(graph)
    return [linear for linear in candidates if linear.weight not in refused]


def _candidates(graph: fx.Graph) -> tuple[list[_Linear], frozenset[str]]:
    """The linears that could be replaced by themselves, and the weights of those that cannot."""
    writes = Writes()
    candidates, refused = [], set()
    for node in graph.nodes:
        writes.visit(node)
        if node.op != "call_function" or node.target not in (ops.linear.default, ops.linear.float_activation):
            continue
        arguments = named_arguments(node)
        weight, bias = str(arguments["w_codes"].target).removesuffix(".codes"), arguments["bias"]
        is_float = node.target is ops.linear.float_activation
        encoder = None if is_float else _encoder(arguments)
        if (bias is not None and bias.op != "get_attr") or not (is_float or encoder):
            refused.add(weight)
            continue
        read = (arguments["x"], writes.before(arguments["x"])) if is_float else (encoder, arguments["dtype"])
        shared = (*read, arguments["w_codebooks"], arguments["array_size"])
        candidates.append(_Linear(node, weight, bias, shared))
    return candidates, frozenset(refused)


def _encoder(arguments: dict[str, Any]) -> fx.Node | None:
    """The `quantize_activation` node whose four results a linear reads, with its codebooks; None if it reads others."""
    parts = [arguments[name] for name in PARTS]
    encoder = parts[0].args[0] if parts[0].target is operator.getitem else None
    if not isinstance(encoder, fx.Node) or encoder.target is not ops.quantize_activation.default:
        return None
    in_order = all(part.args == (encoder, i) for i, part in enumerate(parts))
    encoded = named_arguments(encoder)
    same = all(encoded[name] == arguments[name] for name in ("codebooks", "array_size"))
    return encoder if in_order and same else None


def _register_transient(graph_module: fx.GraphModule, name: str, value: Tensor) -> None:
    """A buffer that state dicts leave out."""
    owner, _, last = name.rpartition(".")
    module: nn.Module = get_attribute(graph_module, owner)
    module.register_buffer(last, value, persistent=False)


def _erase_unread(graph: fx.Graph) -> None:
    """Erase the encoded activations and stored weights that nothing reads now, last to first, so that chains go."""
    for node in reversed(list(graph.nodes)):
        encoded = node.target is ops.quantize_activation.default or node.target is operator.getitem
        if not node.users and (node.op == "get_attr" or encoded):
            graph.erase_node(node)
