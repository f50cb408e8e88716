"""An FX graph as JSON and back, without pickle: a file can name operators, never run code of its own."""

from __future__ import annotations

import keyword
import math
import operator
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

import lobcq_fx.ops  # noqa: F401  (registers the ops that a saved graph calls)
from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.bounds import DEEPEST_ARGUMENT, LONGEST_TEXT, MOST_NODES, SYMBOLIC, check_numbers, check_scalar
from lobcq_fx.storage.operators import allowed, explain
from lobcq_fx.tracing.example import EXAMPLE, InputExample

_CALLS: dict[str, Callable[..., Any]] = {"operator.getitem": operator.getitem, **SYMBOLIC}
"""The only calls besides operators that a traced graph makes: one of several results, and arithmetic on sizes."""

_ATTRIBUTE = re.compile(r"[\w-]+(\.[\w-]+)*")
"""Dotted names of parameters and buffers: list indices and keys with a hyphen occur, quotes do not."""

_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError),
)
"""What reading a malformed node may raise, here or in torch."""

_TAKEN = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "math", "_operator"})
"""Names that the source of `forward` refers to: a variable would hide what they stand for."""

_TORCH_VALUES: dict[type, str] = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes in order, JSON-ready.

    Raises:
        CheckpointError: the graph calls something that cannot be written down.
    """
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _target_name(node) if node.op == "call_function" else str(node.target),
            "args": _encode(node.args),
            "kwargs": _encode(dict(node.kwargs)),
            **_example(node),
        }
        for node in graph.nodes
    ]


def graph_from_json(nodes: list[dict[str, Any]]) -> fx.Graph:
    """Inverse of `graph_to_json`.

    Raises:
        CheckpointError: a node is malformed, or calls something outside the allowed operators.
    """
    if not isinstance(nodes, list) or len(nodes) > MOST_NODES:
        raise CheckpointError(f"graph.json is damaged: its nodes are no list of at most {MOST_NODES:,}")
    graph = fx.Graph()
    by_name: dict[str, fx.Node] = {}
    for entry in nodes:
        try:
            _append(graph, entry, by_name)
        except _DAMAGE as error:
            text = reprlib.repr(entry)
            raise CheckpointError(f"graph.json: node {text} is malformed: {type(error).__name__}: {error}") from None
    _check_inputs(by_name)
    try:
        graph.lint()
    except RuntimeError as error:
        raise CheckpointError(f"graph.json: {error}") from None
    check_numbers(graph)
    return graph


def _check_inputs(by_name: Mapping[str, fx.Node]) -> None:
    """FX names the arguments of `forward` after the targets of inputs: another value of that name would replace one."""
    inputs = {node.target: node for node in by_name.values() if node.op == "placeholder"}
    for node in by_name.values():
        if node.op == "placeholder" and inputs[node.target] is not node:
            raise CheckpointError(f"graph.json: the inputs {node.name!r} and {inputs[node.target].name!r} are one")
        given = inputs.get(node.name)
        if given is not None and given is not node:
            raise CheckpointError(f"graph.json: node {node.name!r} has the name of the argument for {given.name!r}")


def _append(graph: fx.Graph, entry: dict[str, Any], by_name: dict[str, fx.Node]) -> None:
    """Add the node that an entry of the file describes."""
    name, op, target = entry["name"], entry["op"], entry["target"]
    if not isinstance(name, str) or len(name) > LONGEST_TEXT:
        raise ValueError("its name is no text, or too long")
    if op not in ("placeholder", "get_attr", "call_function", "output"):
        raise CheckpointError(f"graph.json: node {name!r} has the kind {op!r}, which is not allowed")
    args, kwargs = _decode(entry["args"], by_name), _decode(entry["kwargs"], by_name)
    _check_identifiers(name, op, target, kwargs)
    if op == "output" and (kwargs or len(args) != 1):
        raise ValueError("an output has one argument")
    if kwargs.get("pin_memory"):
        raise ValueError("it asks for pinned memory, which not every machine has")
    resolved = _resolve(target) if op == "call_function" else target
    if resolved is operator.getitem and not _picks_a_result(args, kwargs):
        raise ValueError("getitem takes a node and a number")
    node = graph.create_node(op, resolved, tuple(args), kwargs, name=name)
    if op == "placeholder" and "example" in entry:
        node.meta[EXAMPLE] = InputExample.from_dict(entry["example"])
    by_name[name] = node


def _picks_a_result(args: Any, kwargs: Any) -> bool:
    return not kwargs and len(args) == 2 and isinstance(args[0], fx.Node) and type(args[1]) is int


def operators(graph: fx.Graph) -> frozenset[str]:
    """What the graph calls, as `graph_to_json` would name it if it were all allowed."""
    return frozenset(_name(node) for node in graph.nodes if node.op == "call_function")


def _example(node: fx.Node) -> dict[str, Any]:
    """What an input was in the traced example, from which the values of all nodes follow."""
    example = InputExample.of(node) if node.op == "placeholder" else None
    return {} if example is None else {"example": example.to_dict()}


def _check_identifiers(name: str, op: str, target: str, kwargs: dict[str, Any]) -> None:
    """FX writes these into the source of `forward` as they stand: anything but a name would be code from the file."""
    if op == "placeholder" and not _is_name(target):
        raise CheckpointError(f"graph.json: node {name!r} has the target {target!r}, which is no Python name")
    for text in (name, target) if op == "placeholder" else (name,):
        if text in _TAKEN:
            raise CheckpointError(f"graph.json: node {name!r} is called {text!r}, which FX has a use for")
    if op == "get_attr" and not _ATTRIBUTE.fullmatch(target):
        raise CheckpointError(f"graph.json: node {name!r} has the target {target!r}, which is no attribute name")
    for key in kwargs:
        if not _is_name(key):
            raise CheckpointError(f"graph.json: node {name!r} has the keyword {key!r}, which is no Python name")


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _target_name(node: fx.Node) -> str:
    name = _name(node)
    if name not in _CALLS and name not in allowed():
        raise CheckpointError(f"cannot save node {node.name!r}: it calls {explain(name)}")
    return name


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"ops.{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    return next((name for name, function in _CALLS.items() if function is target), str(target))


def _resolve(name: str) -> Callable[..., Any]:
    if name in _CALLS:
        return _CALLS[name]
    if name not in allowed():
        raise CheckpointError(f"graph.json calls {explain(reprlib.repr(name))}")
    _, namespace, packet, overload = name.split(".")
    target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if not isinstance(target, torch._ops.OpOverload):
        raise CheckpointError(f"graph.json calls {name!r}, which is no operator")
    return target


def _encode(value: Any) -> Any:
    """JSON for an argument; anything that JSON lacks becomes {kind: text}."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        items = [_encode(item) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
    if type(value) in _TORCH_VALUES:
        return {_TORCH_VALUES[type(value)]: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"cannot save an argument of type {type(value).__name__}: {value!r}")


def _decode(value: Any, nodes: dict[str, fx.Node], depth: int = 0) -> Any:
    if depth > DEEPEST_ARGUMENT:
        raise ValueError(f"an argument is nested deeper than {DEEPEST_ARGUMENT} levels")
    depth += 1
    if isinstance(value, list):
        return [_decode(item, nodes, depth) for item in value]
    if not isinstance(value, dict):
        check_scalar(value)
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return nodes[content]
        case "tuple":
            return tuple(_decode(item, nodes, depth) for item in content)
        case "dict":
            return {key: _decode(item, nodes, depth) for key, item in content}
        case "slice":
            return slice(*(_decode(part, nodes, depth) for part in content))
        case "dtype" | "layout" | "memory_format":
            constant = getattr(torch, content)
            if type(constant) not in _TORCH_VALUES:
                raise CheckpointError(f"graph.json: torch.{content} is no {kind}")
            return constant
        case "device":
            return torch.device(content)
        case "float":
            return float(content)
        case _:
            raise CheckpointError(f"graph.json: unknown argument kind {kind!r}")
