"""A graph of many layers alike, made of the trace of a few: what the last two of those differ in, further ones do too.

The nodes of the second layer are paired with those of the third, one by one. Every layer after them gets a copy that
steps on in the same way from the layer before: it reads what that one gave, states and tensors of its own, and what all
layers share. Where any pair differs in something else, a number for example, nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lobcq_fx.errors import TraceError
from lobcq_fx.graph.aliasing import written_attributes
from lobcq_fx.graph.attributes import get_attribute, has_attribute, register_attribute
from lobcq_fx.graph.graph_module import LobcqGraphModule

LAYERS = 3
"""As many are traced: the first may have more to do, the other two are compared."""

FIRST, SECOND = LAYERS - 2, LAYERS - 1
"""The two that are compared."""


@dataclass(frozen=True)
class States:
    """Placeholders that hold layers' states, in turn. first: place of the first one. each: how many a layer has."""

    first: int
    each: int

    def of_layer(self, placeholders: Sequence[fx.Node], layer: int) -> list[fx.Node]:
        """Those of a layer."""
        start = self.first + layer * self.each
        return list(placeholders[start : start + self.each])


def repeat_layers(
    graph_module: fx.GraphModule, path: str, count: int, states: States, model: nn.Module
) -> fx.GraphModule:
    """The graph of a model of `count` layers.

    Args:
        graph_module: of a trace of the first `LAYERS` of them; plain, as `plain_graph_module` gives it.
        path: dotted path of the list of layers.
        count: how many the model has, more than `LAYERS`.
        states: what of its inputs belongs to layers. Results that belong to them stand at the end, as many for each.
        model: has the tensors of all layers.

    Returns:
        A new graph module, on the model's memory.

    Raises:
        TraceError: the layers that were traced are not alike, or their nodes do not follow each other.
    """
    if written_attributes(graph_module.graph):
        raise TraceError("its graph writes to tensors of the model")
    pairs = _Pairs.of(graph_module, path, states)
    copies = _Copies(pairs, count)
    graph = copies.graph()
    for name, template in copies.attributes.items():
        register_attribute(graph_module, name, _tensor_like(graph_module, model, name, template))
    return LobcqGraphModule(graph_module, graph, class_name="LobcqGraph")


def _tensor_like(graph_module: fx.GraphModule, model: nn.Module, name: str, template: str) -> Tensor:
    """The model's tensor of a name, where the graph calls that of a traced layer as the model does."""
    if not (has_attribute(model, name) and has_attribute(model, template)):
        raise TraceError(f"{name} is no tensor of the model")
    of_graph = get_attribute(graph_module, template)
    like, tensor = get_attribute(model, template), get_attribute(model, name)
    if like.data_ptr() != of_graph.data_ptr() or (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        raise TraceError(f"{name} is not what {template} is")
    return nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(of_graph, nn.Parameter) else tensor


@dataclass(frozen=True)
class _Pairs:
    """The nodes of two layers that follow each other, one by one.

    steps: what a node that one layer reads is to the next one: its own counterpart, or the same where all share it.
    blocks: the nodes of the two layers, in order.
    """

    graph: fx.Graph
    path: str
    states: States
    placeholders: list[fx.Node]
    blocks: tuple[list[fx.Node], list[fx.Node]]
    steps: dict[fx.Node, fx.Node]

    @classmethod
    def of(cls, graph_module: fx.GraphModule, path: str, states: States) -> _Pairs:
        graph = graph_module.graph
        calls = [node for node in graph.nodes if node.op == "call_function"]
        others = {node.op for node in graph.nodes} - {"call_function", "get_attr", "placeholder", "output"}
        if others:
            raise TraceError(f"its graph has a {min(others)}")
        one, other = _blocks(calls, path)
        placeholders = list(graph.find_nodes(op="placeholder"))
        pairs = cls(graph, path, states, placeholders, (one, other), dict(zip(one, other, strict=True)))
        places = {node: place for place, node in enumerate(calls)}
        for first, second in zip(one, other, strict=True):
            pairs._compare(first, second, places)
        pairs._check_surroundings(calls)
        return pairs

    def _compare(self, first: fx.Node, second: fx.Node, places: Mapping[fx.Node, int]) -> None:
        leaves, spec = pytree.tree_flatten((first.args, first.kwargs))
        others, other_spec = pytree.tree_flatten((second.args, second.kwargs))
        same = first.target is second.target and spec == other_spec
        if not same or _described(first) != _described(second):
            raise TraceError(f"{first.name} of a layer is {second.name} in the next")
        for leaf, other in zip(leaves, others, strict=True):
            if isinstance(leaf, fx.Node) and isinstance(other, fx.Node):
                if self.steps.setdefault(leaf, other) is not other or not self._steps_on(leaf, other, places):
                    raise TraceError(f"{second.name} reads {other.name} where a layer before it read {leaf.name}")
            elif type(leaf) is not type(other) or leaf != other:
                raise TraceError(f"{second.name} takes {other} where a layer before it took {leaf}")

    def _steps_on(self, leaf: fx.Node, other: fx.Node, places: Mapping[fx.Node, int]) -> bool:
        if leaf is other:
            of_a_layer = leaf.op == "get_attr" and str(leaf.target).startswith(f"{self.path}.")
            return self.layer_of_state(leaf) is None and not of_a_layer
        if leaf.op == "placeholder":
            return self.layer_of_state(leaf) == FIRST and self.layer_of_state(other) == SECOND
        if leaf.op == "get_attr":
            return other.op == "get_attr" and self.renamed(str(leaf.target), FIRST, SECOND) == other.target
        block, start = len(self.blocks[0]), places[self.blocks[0][0]]
        near = leaf.op == other.op and places[leaf] >= start - block  # this layer's, or what the one before it gave
        return near and places[other] - places[leaf] == block

    @cached_property
    def private(self) -> frozenset[fx.Node]:
        """What layers before the last traced one give, and do not share with all others."""
        calls = [node for node in self.graph.nodes if node.op == "call_function"]
        start = next(place for place, node in enumerate(calls) if _layer_of(node, self.path) is not None)
        layers = calls[start : calls.index(self.blocks[1][0])]
        return frozenset(node for node in layers if self.steps.get(node) is not node)

    def _check_surroundings(self, calls: list[fx.Node]) -> None:
        """What comes before the layers reads no more than sizes of their states; what follows them, the last alone."""
        start, end = calls.index(self.blocks[0][0]), calls.index(self.blocks[1][-1])
        for place, node in enumerate(calls):
            for read in node.all_input_nodes:
                ahead = place < start and self.layer_of_state(read) not in (None, 0)
                behind = place > end and (read in self.private or self.layer_of_state(read) is not None)
                if behind or (ahead and node.target is not torch.ops.aten.sym_size.int):
                    raise TraceError(f"{node.name}, which is not of that layer, reads {read.name}")

    def layer_of_state(self, node: fx.Node) -> int | None:
        """The traced layer whose state a placeholder is."""
        return next((n for n in range(LAYERS) if node in self.states.of_layer(self.placeholders, n)), None)

    def owned_by(self, node: fx.Node, layer: int) -> bool:
        """Whether a node reads a tensor of a layer."""
        return node.op == "get_attr" and str(node.target).startswith(f"{self.path}.{layer}.")

    def renamed(self, name: str, layer: int, other: int) -> str | None:
        """A name within one layer as it is within another; None for a name that is in none."""
        prefix = f"{self.path}.{layer}."
        return f"{self.path}.{other}.{name.removeprefix(prefix)}" if name.startswith(prefix) else None


def _described(node: fx.Node) -> str:
    """What a node gives."""
    value = node.meta.get("val")
    leaves = pytree.tree_leaves(value)
    return str([(str(one.shape), one.dtype, one.device) if isinstance(one, Tensor) else str(one) for one in leaves])


def _blocks(calls: list[fx.Node], path: str) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes of the two layers, as many each, what their surroundings do between them included."""
    layers = [_layer_of(node, path) for node in calls]
    if any(layer not in layers for layer in range(LAYERS)):
        raise TraceError(f"{path} is not called layer by layer")
    first, second = layers.index(FIRST), layers.index(SECOND)
    size = second - first
    inside = {FIRST: layers[first:second], SECOND: layers[second : second + size]}
    for layer, part in inside.items():
        if size <= 0 or part.count(layer) != layers.count(layer) or set(part) - {layer, None}:
            raise TraceError(f"layer {layer} of {path} is not called as a whole")
    return calls[first:second], calls[second : second + size]


def _layer_of(node: fx.Node, path: str) -> int | None:
    """The layer within which a node was traced."""
    for module_path, *_ in (node.meta.get("nn_module_stack") or {}).values():
        rest = str(module_path).removeprefix(f"{path}.")
        if rest != module_path:
            return int(rest.partition(".")[0])
    return None


@dataclass
class _Copies:
    """The graph of all layers. attributes: names of tensors that it reads besides, with those they are like."""

    pairs: _Pairs
    count: int
    attributes: dict[str, str] = field(default_factory=dict)
    _copied: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _of_layer: dict[int, dict[fx.Node, fx.Node]] = field(default_factory=dict)

    def graph(self) -> fx.Graph:
        """Every node in order, and behind those of the last traced layer those of the further ones."""
        pairs, graph, further = self.pairs, fx.Graph(), range(LAYERS, self.count)
        block = pairs.blocks[1]
        tensors = [node for node in pairs.graph.nodes if pairs.owned_by(node, SECOND)]
        states = pairs.states.of_layer(pairs.placeholders, SECOND)
        ends = {part[-1]: part for part in (tensors, states, block) if part}
        self._of_layer = {layer: {} for layer in (SECOND, *further)}
        for node in pairs.graph.nodes:
            if node.op == "output":
                graph.output(self._results(node))
                continue
            copy = self._add(graph, node, node.name, self._copied.__getitem__)
            self._copied[node] = self._of_layer[SECOND][node] = copy
            for layer in further:
                for one in ends.get(node, ()):
                    self._of_layer[layer][one] = self._add_of_layer(graph, one, layer)
            if node is block[-1]:  # what follows reads the last layer, and of the others what they share
                self._copied |= {one: self._of_layer[self.count - 1][one] for one in block}
        return graph

    def _add(self, graph: fx.Graph, node: fx.Node, name: str, copy_of: Callable[[fx.Node], fx.Node]) -> fx.Node:
        args, kwargs = pytree.tree_map_only(fx.Node, copy_of, (node.args, node.kwargs))
        copy = graph.create_node(node.op, node.target, args, kwargs, name)
        if node.op == "placeholder":
            copy.target = copy.name
        copy.meta = dict(node.meta)
        return copy

    def _add_of_layer(self, graph: fx.Graph, node: fx.Node, layer: int) -> fx.Node:
        """What a node of the last traced layer is to a further one."""
        base, _, number = node.name.rpartition("_")
        name = base if number.isdigit() else node.name
        if node.op == "placeholder":
            name = f"{base}_{int(number) + (layer - SECOND) * self.pairs.states.each}"
        target = self.pairs.renamed(str(node.target), SECOND, layer)
        if node.op == "get_attr" and target is not None:
            self.attributes[target] = str(node.target)
            name = target.replace(".", "_")
        copy = self._add(graph, node, name, lambda one: self._read_by(layer, one))
        if node.op == "get_attr" and target is not None:
            copy.target = target
        if node.meta.get("nn_module_stack"):
            copy.meta["nn_module_stack"] = dict(self._stack(node, layer))
        return copy

    def _stack(self, node: fx.Node, layer: int) -> Iterator[tuple[str, Any]]:
        old, new = (f"{self.pairs.path}.{one}" for one in (SECOND, layer))
        for key, (path, kind) in node.meta["nn_module_stack"].items():
            inside = path == old or str(path).startswith(f"{old}.")
            yield (str(key).replace(old, new), (new + path.removeprefix(old), kind)) if inside else (key, (path, kind))

    def _read_by(self, layer: int, node: fx.Node) -> fx.Node:
        """What a further layer reads where the last traced one reads `node`."""
        own = self._of_layer[layer].get(node)
        if own is not None:
            return own
        step = self.pairs.steps.get(node, node)
        return self._copied[node] if step is node else self._of_layer[layer - 1][step]

    def _results(self, output: fx.Node) -> tuple[fx.Node, ...]:
        """What the model gives, and what every layer gives of its states."""
        results: Sequence[fx.Node] = output.args[0]  # type: ignore[assignment]
        each, (one, _) = self.pairs.states.each, self.pairs.blocks
        of_layers = len(results) - each * LAYERS if set(one) & set(results) else len(results)
        head, (zeroth, first, second) = results[:of_layers], _parts(results[of_layers:], each)
        if [self.pairs.steps.get(node) for node in first] != list(second) or self.pairs.private & set(head):
            raise TraceError("its graph does not return the same of each layer")
        before = [self._copied[node] for node in (*zeroth, *first)]
        states = [self._of_layer[layer][node] for layer in range(SECOND, self.count) for node in second]
        return (*(self._copied[node] for node in head), *before, *states)


def _parts(results: Sequence[fx.Node], each: int) -> list[Sequence[fx.Node]]:
    """Of every traced layer."""
    return [results[layer * each : (layer + 1) * each] for layer in range(LAYERS)]
