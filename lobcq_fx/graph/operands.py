"""What a matmul's node reads: constant operands seen through transposes, and what it was called when it was traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

OPERATION = "lobcq_operation"
"""`node.meta` key: what a normalized matmul was called in the traced graph."""


def constant_weight(node: object) -> tuple[fx.Node, bool] | None:
    """The `get_attr` node behind `node`, and whether it is transposed an odd number of times; None if not constant."""
    flipped = False
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            return node, flipped
        if not is_transpose(node):
            return None
        flipped, node = not flipped, node.args[0]
    return None


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The `get_attr` nodes of a graph, and what is computed from such alone. One walk, however deep the graph is."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and inputs and constant.issuperset(inputs)):
            constant.add(node)
    return constant


def made_of(node: fx.Node) -> list[fx.Node]:
    """A node and all that it is computed from, each once, in the order of its operands."""
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found[one] = None
            waiting.extend(reversed(one.all_input_nodes))
    return list(found)


def operation_name(node: fx.Node) -> str:
    """What the node was called in the traced graph: `linear`, `addmm`, `matmul`, ..."""
    original = node.meta.get(OPERATION)
    if isinstance(original, str):
        return original
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def is_transpose(node: fx.Node) -> bool:
    """Whether the node swaps the two dimensions of a matrix, or the last two of a stack of them."""
    value = node.meta.get("val")
    if node.op != "call_function" or value is None or not hasattr(value, "dim") or value.dim() not in (2, 3):
        return False
    args: tuple[Any, ...] = node.args
    dims = value.dim()
    if node.target in (aten.t.default, aten.numpy_T.default):
        return bool(dims == 2)
    if node.target is aten.mT.default:
        return True
    if node.target is aten.transpose.int:
        return {int(dim) % dims for dim in args[1:3]} == {dims - 2, dims - 1}
    swapped = [*range(dims - 2), dims - 1, dims - 2]
    return node.target is aten.permute.default and [int(dim) % dims for dim in args[1]] == swapped


def is_stack_of_one(node: fx.Node) -> bool:
    """Whether the node puts one matrix, or a stack of one, into a stack, without a copy."""
    if node.op != "call_function" or node.target not in (aten.expand.default, aten.unsqueeze.default):
        return False
    matrix: Any = node.args[0]
    shape, source = node.meta["val"].shape, matrix.meta["val"].shape
    return len(shape) == 3 and len(source) > 1 and (len(source) == 2 or source[0] == 1) and shape[1:] == source[-2:]


def transposed(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """The `t` of a matrix, one for all that read it: that of the graph, before its first reader, or a new one."""
    for user in weight.users:
        if user.target is aten.t.default and user.op == "call_function":
            weight.append(user)  # moved up: it may have been read for the first time after this matmul
            return user
    with graph.inserting_after(weight):
        node = graph.call_function(aten.t.default, (weight,))
    node.meta["val"] = weight.meta["val"].t()
    return node


def readers(weight: fx.Node) -> set[fx.Node]:
    """The nodes that read a constant, looking through its transposes, and stacks of it alone."""
    found: set[fx.Node] = set()
    for user in weight.users:
        found |= readers(user) if is_transpose(user) or is_stack_of_one(user) else {user}
    return found


def readers_of(graph: fx.Graph, name: str) -> set[fx.Node]:
    """The same of all nodes of the constant called `name`."""
    return set().union(*map(readers, graph.find_nodes(op="get_attr", target=name)))


def erase_unread(weight: fx.Node) -> None:
    """Erase a constant's node and its transposes where nothing reads them: the tensor behind them may be gone."""
    for user in list(weight.users):
        if is_transpose(user) or is_stack_of_one(user):
            erase_unread(user)
    if not weight.users:
        weight.graph.erase_node(weight)
