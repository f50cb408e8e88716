"""A part of a graph as a graph of its own: from some of its values to others of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lobcq_fx.errors import TraceError
from lobcq_fx.graph.aliasing import owner_of, written_arguments
from lobcq_fx.tracing.sizes import fixed_size

sym_size = torch.ops.aten.sym_size.int


def part_of(graph: fx.Graph, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Graph:
    """What computes some values of a graph from others, with their metadata.

    An input that the graph computes is what it is at the graph's end, whatever was written to it meanwhile. Sizes that
    the graph reads off a tensor the part does not have are read off an input that has them too.

    Args:
        graph: traced here: its values say which symbols their sizes are.
        inputs: tensors; each becomes an input, in this order, whether it is read or not.
        outputs: what is returned, in this order.

    Raises:
        TraceError: an output depends on more than the inputs, or on one before it was written to; names what.
    """
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    sizes: dict[Any, tuple[fx.Node, int]] = {}
    for node in inputs:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = dict(node.meta)
        for dim, size in enumerate(node.meta["val"].shape):
            if fixed_size(size) is None:
                sizes.setdefault(size.node.expr, (copies[node], dim))
    writers = _writers(graph)
    needed = _needed(writers, outputs, copies, sizes)
    _check_reads(graph, writers, needed, inputs)
    for node in graph.nodes:
        if node not in needed or node in copies:
            continue
        if node.op == "placeholder":
            names = ", ".join(one.name for one in inputs)
            raise TraceError(f"{outputs[0].name} depends on {node.name}, not on {names} alone")
        source = sizes.get(_symbol(node))
        if source is None:
            copies[node] = part.node_copy(node, copies.__getitem__)
        else:
            copies[node] = part.call_function(sym_size, source)
            copies[node].meta = dict(node.meta)
    part.output(tuple(copies[node] for node in outputs))
    return part


def _writers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The nodes that write to memory, by the node that owns it."""
    writers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        for argument in written_arguments(node):
            writers[owner_of(argument)].append(node)
    return writers


def _needed(writers: Any, outputs: Sequence[fx.Node], copies: Any, sizes: Any) -> set[fx.Node]:
    """The nodes that outputs depend on, up to inputs and their sizes; those that write to such memory included."""
    computed = {owner_of(node) for node in copies if node.op != "placeholder"}
    needed: set[fx.Node] = set()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node in needed:
            continue
        needed.add(node)
        if _symbol(node) in sizes:
            continue
        if owner_of(node) not in computed:
            waiting.extend(writers[owner_of(node)])
        if node not in copies:
            waiting.extend(node.all_input_nodes)
    return needed


def _check_reads(graph: fx.Graph, writers: Any, needed: set[fx.Node], inputs: Sequence[fx.Node]) -> None:
    """That a part reads no input before the last write to it."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    last = {
        owner_of(node): max(map(places.__getitem__, writers[owner_of(node)]), default=-1)
        for node in inputs
        if node.op != "placeholder"
    }
    for node in needed.difference(inputs):
        for argument in node.all_input_nodes:
            if places[node] <= last.get(owner_of(argument), -1):
                raise TraceError(f"{node.name} reads {argument.name} before the last write to it")


def _symbol(node: fx.Node) -> Any:
    """The symbol, or the arithmetic on symbols, that a node's value is; None where it is a tensor or a plain number."""
    value = node.meta.get("val")
    return None if isinstance(value, Tensor) or not isinstance(value, torch.SymInt) else value.node.expr
