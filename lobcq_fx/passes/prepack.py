"""Pass: put weights into a device's kernel layout, and let linears read those and encode their activation themselves.

quantize_activation(x); linear(codes, ..., w)                   ->  linear_prepacked(x, tables, [w])             W4A4
quantize_activation_int8(x); linear.int8_activation(..., w)     ->  linear_prepacked(x, None, [w])               W4A8
quantize_activation(rotate(x)); linear(codes, ..., w)           ->  linear_prepacked(x, ..., rotated=True)
linear.float_activation(x, w)                                   ->  linear_prepacked.float_activation(x, [w])    W4A16
grouped_linear(..., w, offsets, rows)                           ->  grouped_linear_prepacked(x, ..., w, offsets, rows)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

import lobcq_fx.ops  # noqa: F401  (registers the ops that this pass matches and emits)
from lobcq_fx.calibration.codebook_sets import MODULE
from lobcq_fx.graph.aliasing import written_between
from lobcq_fx.graph.attributes import (
    add_call,
    add_get_attr,
    get_attr_node,
    get_attribute,
    has_attribute,
    named_arguments,
)
from lobcq_fx.graph.stored_linear import ENCODERS, StoredLinear, stored_linears
from lobcq_fx.modules.packed_weight import PREPACKED, PackedWeight, WeightLayout
from lobcq_fx.passes.infra import GraphPass

ops = torch.ops.lobcq

ABSENT = f"{MODULE}.absent"
"""The empty tensor that stands for a bias, or anything else, that a linear does not have."""

TABLES = "_tables"
"""What the name of a codebook set's look-up tables ends in."""


@dataclass(frozen=True)
class Prepack(GraphPass):
    """Repack weights and replace their linears. What was stored is no longer in the graph; `restore_weights` undoes it.

    A linear whose bias is computed in the graph keeps the ops of the format, and so does every other that reads its
    weight: the call stands where the activation was encoded, and the bias may not be known there yet. So does one whose
    encoded activation is not the result of what encodes it for that linear, and a weight that is multiplied in arrays
    of two sizes; and the experts of a mixture where the device has no kernels for stacks of weights.

    Args:
        layout: of the device's kernels.
        stored: weights that another graph on the same tensors reads as they are stored; none is repacked.
    """

    name: ClassVar[str] = "prepack"

    layout: WeightLayout
    stored: frozenset[str] = frozenset()

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Replace linears one by one, at the place where their activation was encoded or read."""
        stored = self.stored | weights_as_stored(graph_module.graph)
        linears = [
            linear
            for linear in stored_linears(graph_module.graph)
            if linear.weight not in stored and (self.layout.stacks or not linear.grouped)
        ]
        sizes = {linear.weight: linear.kernel_array_size for linear in linears}
        for name in sorted(sizes):
            weight = get_attribute(graph_module, name)
            if weight.layout is None:  # another graph's run may have repacked it
                weight.repack(self.layout, sizes[name])
        for linear in linears:
            if linear.grouped:
                self._replace_grouped(graph_module, linear)
            else:
                self._replace(graph_module, linear)
        if linears:
            _erase_unread(graph_module.graph)
        return bool(linears)

    def _replace(self, graph_module: fx.GraphModule, linear: StoredLinear) -> None:
        graph, node, encoder = graph_module.graph, linear.node, linear.encoder
        args: tuple[Any, ...]
        rest = (
            [add_get_attr(graph_module, f"{linear.weight}.{PREPACKED}")],
            [get_attr_node(graph_module, f"{linear.weight}.tensor_scale")],
            self._tables(graph_module, linear.codebooks),
            [absent(graph_module) if linear.bias is None else get_attr_node(graph_module, str(linear.bias.target))],
            [get_attribute(graph_module, linear.weight).rows],
            linear.kernel_array_size,
        )
        if encoder is None:
            target, args = ops.linear_prepacked.float_activation, (linear.activation, *rest)
        else:
            encoded = named_arguments(encoder)
            tables = self._tables(graph_module, encoded["codebooks"]) if "codebooks" in encoded else None
            target = ops.linear_prepacked.default
            x, rotated = _to_encode(encoder, encoder)
            args = (x, tables, encoded.get("static_scale"), *rest, linear.arguments["dtype"], rotated)
        with graph.inserting_before(encoder or node):
            call = add_call(graph, target, args, like=node)
            result = add_call(graph, operator.getitem, (call, 0), like=node)
        node.replace_all_uses_with(result)
        graph.erase_node(node)

    def _replace_grouped(self, graph_module: fx.GraphModule, linear: StoredLinear) -> None:
        """The call stands where the linear did: its groups may not be known before."""
        graph, node, encoder = graph_module.graph, linear.node, linear.encoder
        args: tuple[Any, ...] = (
            add_get_attr(graph_module, f"{linear.weight}.{PREPACKED}"),
            get_attr_node(graph_module, f"{linear.weight}.tensor_scale"),
            self._tables(graph_module, linear.codebooks),
            *linear.groups,
            get_attribute(graph_module, linear.weight).rows,
            linear.kernel_array_size,
        )
        x, target = linear.activation, ops.grouped_linear_prepacked.float_activation
        if encoder is not None:
            target, encoded = ops.grouped_linear_prepacked.default, named_arguments(encoder)
            tables = self._tables(graph_module, encoded["codebooks"]) if "codebooks" in encoded else None
            x, rotated = _to_encode(encoder, node)
            args = (tables, encoded.get("static_scale"), *args, linear.arguments["dtype"], rotated)
        with graph.inserting_before(node):
            call = add_call(graph, target, (x, *args), like=node)
        node.replace_all_uses_with(call)
        graph.erase_node(node)

    def _tables(self, graph_module: fx.GraphModule, codebooks: fx.Node) -> fx.Node:
        name = f"{codebooks.target}{TABLES}"
        if not has_attribute(graph_module, name):
            tables = self.layout.tables(get_attribute(graph_module, str(codebooks.target)))
            _register_transient(graph_module, name, tables)
        return get_attr_node(graph_module, name)


def absent(graph_module: fx.GraphModule) -> fx.Node:
    """The node of `ABSENT`."""
    if not has_attribute(graph_module, ABSENT):
        device = next(get_attribute(graph_module, MODULE).buffers()).device
        _register_transient(graph_module, ABSENT, torch.empty(0, dtype=torch.float32, device=device))
    return get_attr_node(graph_module, ABSENT)


def restore_weights(graph_module: fx.GraphModule) -> None:
    """Bring every weight back into the layout it is stored in, and drop what the kernels looked up.

    The graph is not changed: put back one that reads stored weights.
    """
    for module in graph_module.modules():
        if isinstance(module, PackedWeight) and module.layout is not None:
            module.restore()
    for name in [name for name, _ in graph_module.named_buffers() if name == ABSENT or name.endswith(TABLES)]:
        owner, _, last = name.rpartition(".")
        delattr(get_attribute(graph_module, owner), last)


def weights_as_stored(graph: fx.Graph) -> frozenset[str]:
    """The weights that the graph goes on reading as they are stored after `Prepack`."""
    linears = list(stored_linears(graph))
    first = {linear.weight: linear.kernel_array_size for linear in reversed(linears)}
    return frozenset(
        linear.weight
        for linear in linears
        if linear.activation is None
        or (linear.bias is not None and linear.bias.op != "get_attr")
        or (linear.grouped and _written_since_encoded(linear))
        or linear.kernel_array_size != first[linear.weight]
    )


def _written_since_encoded(linear: StoredLinear) -> bool:
    """Whether what was encoded for a linear is another by the time the linear runs."""
    encoder, x = linear.encoder, linear.activation
    return encoder is not None and x is not None and written_between(encoder, linear.node, [x])


def _register_transient(graph_module: fx.GraphModule, name: str, value: Tensor) -> None:
    """A buffer that state dicts leave out."""
    owner, _, last = name.rpartition(".")
    module: nn.Module = get_attribute(graph_module, owner)
    module.register_buffer(last, value, persistent=False)


def _to_encode(encoder: fx.Node, place: fx.Node) -> tuple[fx.Node, bool]:
    """What stands before an encoder, or before the rotation of its block arrays; and whether that has to be rotated.

    place: where it is encoded from now on.
    """
    encoded = named_arguments(encoder)
    x: fx.Node = encoded["x"]
    if x.target is not ops.rotate.default:
        return x, False
    source, array_size = x.args
    assert isinstance(source, fx.Node)
    if array_size != encoded["array_size"] or written_between(x, place, [source]):
        return x, False
    return source, True


def _erase_unread(graph: fx.Graph) -> None:
    """Erase what nothing reads now of encoded activations and stored weights, last to first, so that chains go."""
    for node in reversed(list(graph.nodes)):
        encoded = node.target in (*ENCODERS.values(), ops.rotate.default, operator.getitem)
        if not node.users and (node.op == "get_attr" or encoded):
            graph.erase_node(node)
