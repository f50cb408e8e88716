"""Dotted attribute names of a graph module: read, register and delete what `get_attr` nodes refer to."""

from __future__ import annotations

from collections.abc import Container
from functools import cache
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, fx, nn

from lobcq_fx.graph.fake_tensors import fake_mode
from lobcq_fx.modules.packed_weight import PackedWeight


def get_attribute(module: nn.Module, name: str) -> Any:
    """The parameter, buffer or submodule called `name` (dotted).

    Raises:
        AttributeError: there is none.
    """
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether `get_attribute` would find `name`."""
    try:
        get_attribute(module, name)
    except AttributeError:
        return False
    return True


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first tensor is; the CPU where it has none."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def register_attribute(module: nn.Module, name: str, value: Tensor | nn.Module) -> None:
    """Register a parameter, buffer or submodule under a dotted name, creating the modules on the way."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if isinstance(value, nn.Module):
        module.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        module.register_parameter(last, value)
    else:
        module.register_buffer(last, value)


def replace_attribute(graph_module: fx.GraphModule, name: str, value: Tensor) -> None:
    """Put another tensor in the place of the one called `name` (dotted), for all that read it. Parameters stay such."""
    if isinstance(get_attribute(graph_module, name), nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    owner, _, last = name.rpartition(".")
    setattr(get_attribute(graph_module, owner) if owner else graph_module, last, value)
    mode = fake_mode(graph_module.graph)
    for node in graph_module.graph.find_nodes(op="get_attr", target=name):
        if mode is not None:
            node.meta["val"] = mode.from_tensor(value, static_shapes=True)


def delete_attribute(module: nn.Module, name: str) -> None:
    """Remove the parameter, buffer or submodule called `name`."""
    owner, _, last = name.rpartition(".")
    delattr(get_attribute(module, owner) if owner else module, last)


def free_name(module: nn.Module, layer: str, last: str, given: Container[str] = ()) -> str:
    """A dotted name for a new attribute `last` of `layer` ("" for the module itself), numbered where it is taken.

    `given` are names that are taken too.

    A layer that is a bare parameter (`self.w`, not `self.linear.weight`) can hold none: the name then stands beside it.
    """
    owner = get_attribute(module, layer) if has_attribute(module, layer) else None
    name = f"{layer}_{last}" if isinstance(owner, (Tensor, PackedWeight)) else f"{layer}.{last}".removeprefix(".")
    candidates = chain([name], (f"{name}_{number}" for number in count(1)))
    return next(name for name in candidates if name not in given and not has_attribute(module, name))


def add_get_attr(graph_module: fx.GraphModule, name: str) -> fx.Node:
    """A new `get_attr` node for `name` at the top of the graph, with metadata where the graph carries it."""
    graph = graph_module.graph
    mode = fake_mode(graph)
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.get_attr(name)
    if mode is not None:
        node.meta["val"] = mode.from_tensor(get_attribute(graph_module, name), static_shapes=True)
    return node


def add_beside(graph_module: fx.GraphModule, name: str, suffix: str, value: Tensor) -> fx.Node:
    """A node of a new attribute, which stands beside the one called `name`, and is called like it with a suffix."""
    owner, _, last = name.rpartition(".")
    beside = free_name(graph_module, owner, f"{last}{suffix}")
    register_attribute(graph_module, beside, value)
    return add_get_attr(graph_module, beside)


def get_attr_node(graph_module: fx.GraphModule, name: str) -> fx.Node:
    """The first `get_attr` node for `name`, or a new one at the top of the graph."""
    existing = graph_module.graph.find_nodes(op="get_attr", target=name)
    return next(iter(existing), None) or add_get_attr(graph_module, name)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's node by its schema's names; those left to their defaults are absent."""
    return {**dict(zip(_argument_names(node.target), node.args, strict=False)), **node.kwargs}


@cache
def _argument_names(operator: Any) -> tuple[str, ...]:
    """Asked once: torch makes new objects of a schema's arguments each time."""
    return tuple(argument.name for argument in operator._schema.arguments)


def add_call(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node, kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """A new `call_function` node at the insertion point, its provenance taken from `like` and its value computed."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {key: value for key, value in like.meta.items() if key != "val"}
    mode = fake_mode(graph)
    if mode is not None:
        with mode:
            values, named = fx.node.map_arg((args, kwargs or {}), lambda arg: arg.meta["val"])
            node.meta["val"] = target(*values, **named)
    return node
