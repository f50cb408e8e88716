"""Trace: an nn.Module becomes one FX graph with a plain signature, tensors in and tensors out.

`torch.export` captures the model; the graph it returns flattens its inputs with pytree code that Dynamo cannot trace,
so that code moves out of the graph, into a calling convention (`lobcq_fx.tracing.calling`).
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from lobcq_fx.errors import CallError, TraceError
from lobcq_fx.graph.fake_tensors import uncached_fake_tensors
from lobcq_fx.graph.graph_module import LobcqGraphModule
from lobcq_fx.graph.written import module_kept, own_written_tensors
from lobcq_fx.tracing.assumptions import SizeDecisions
from lobcq_fx.tracing.calling import CallingConvention, ModuleCall, bind_arguments
from lobcq_fx.tracing.higher_order import refuse_higher_order
from lobcq_fx.tracing.names import rename_for_fx
from lobcq_fx.tracing.remedies import remedy_for
from lobcq_fx.tracing.sizes import fixed_size, size_oblivious
from lobcq_fx.tracing.structure import Structure

aten = torch.ops.aten


@dataclass(frozen=True)
class TracedModel:
    """A captured model: the flat graph, and how to get from a call of the model to a call of the graph and back."""

    graph_module: fx.GraphModule
    calling: CallingConvention


MAIN = "main"
"""Name of the graph that every model has."""


@dataclass(frozen=True)
class TracedGraphs:
    """The graphs of one model by name, `MAIN` first; each runs the same matmuls in the same order.

    refusals: graphs that could not be made, and why, by name.
    optional: paths of modules that graphs beside the main one may leave out, all of them.
    repeated: not every layer was traced: they have to be nearer to the model than rounding alone would ask for.
    """

    graphs: dict[str, TracedModel]
    refusals: dict[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    repeated: bool = False

    @property
    def graph_modules(self) -> dict[str, fx.GraphModule]:
        """Without their calling conventions."""
        return {name: one.graph_module for name, one in self.graphs.items()}


def trace_module(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> TracedModel:
    """Capture any nn.Module with `torch.export`, every dimension of at least 2 in the example dynamic where it can be.

    Args:
        model: in eval mode or not; it is traced in eval mode.
        args, kwargs: one example call. A batch of 1 is repeated to 2, since a dimension of 1 cannot stay dynamic; where
            the model means something else by a batch of 1, the graph is for that batch alone.

    Raises:
        TraceError: names the module, the source line and the remedy.
    """
    names, inputs = bind_arguments(model, args, kwargs or {})
    for name in inputs:
        if name not in names:  # torch.export takes no dynamic shapes for them
            model_type = type(model).__name__
            raise TraceError(f"{model_type}.forward takes {name!r} through **kwargs; wrap it in a module that names it")
    traced = _export(model, names, widen_batch(inputs))
    try:
        traced.calling.flatten((), inputs)
    except CallError:  # widened, the example goes another way through the model
        traced = _export(model, names, inputs)
    return traced


def _export(model: nn.Module, names: tuple[str, ...], inputs: Mapping[str, Any]) -> TracedModel:
    """The graph for the inputs, and for calls of other sizes for which the model would do the same."""
    shapes = pytree.tree_map(_dynamic_dimensions, dict(inputs))
    try:
        with tracing(model), torch.no_grad(), size_oblivious(), SizeDecisions() as decisions:
            program = torch.export.export(model, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    except TraceError:  # a slice `[:1]` that is broadcast, for example: its size is not known to be 1
        with tracing(model), torch.no_grad(), SizeDecisions() as decisions:
            program = torch.export.export(model, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    graph_module, calling = flatten_program(program, inputs, names, Structure(program.call_spec.out_spec))
    return TracedModel(graph_module, replace(calling, guards=decisions.guards(graph_module)))


def flatten_program(
    program: ExportedProgram, inputs: Mapping[str, Any], names: tuple[str, ...], outputs: Structure
) -> tuple[fx.GraphModule, ModuleCall]:
    """The program's graph without pytree code, and the calling convention that replaces it."""
    graph_module = plain_graph_module(program)
    leaves, in_spec = pytree.tree_flatten(dict(inputs))
    constants = drop_constant_inputs(graph_module, leaves)
    return graph_module, ModuleCall(names, Structure(in_spec), constants, outputs, _traced_shapes(graph_module))


def plain_graph_module(program: ExportedProgram) -> fx.GraphModule:
    """The program as a graph module with parameters, a flat signature, and none of export's run-time assertions."""
    rename_for_fx(program)
    graph_module = refuse_higher_order(program.module(check_guards=False))
    graph_module.graph.set_codegen(fx.graph.CodeGen())
    return own_graph_module(graph_module)


def own_graph_module(graph_module: fx.GraphModule) -> fx.GraphModule:
    """An exported graph module called as before, without run-time assertions, with parameters that no model shares."""
    graph = graph_module.graph
    for node in reversed(graph.nodes):
        unread = node.op == "get_attr" and not node.users
        guard = node.op == "call_module" and node.target == "_guards_fn"
        if unread or guard or node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    # A fresh module drops the exported one's hooks and its eval()/train() overrides.
    plain = LobcqGraphModule(graph_module, graph, class_name="LobcqGraph")
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name, parameter in list(plain.named_parameters(remove_duplicate=False)):
        owner, _, last = name.rpartition(".")
        if not any(name == target or name.startswith(f"{target}.") for target in read):
            delattr(plain.get_submodule(owner), last)  # the other name of a tied weight, which would keep it alive
            continue
        # The same memory, but parameters of its own: what happens to them does not happen to the model's.
        setattr(plain.get_submodule(owner), last, nn.Parameter(parameter.detach(), requires_grad=False))
    own_written_tensors(plain)
    return plain


def drop_constant_inputs(graph_module: fx.GraphModule, leaves: list[Any]) -> dict[int, Any]:
    """Remove the placeholders of inputs that are no tensors; return their values by position."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    for index in constants:
        graph_module.graph.erase_node(placeholders[index])
    graph_module.recompile()
    return constants


def _traced_shapes(graph_module: fx.GraphModule) -> tuple[tuple[int | None, ...], ...]:
    """Shape of each placeholder, None where a dimension is dynamic."""
    values = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    return tuple(tuple(fixed_size(size) for size in value.shape) for value in values)


class tracing:  # noqa: N801  (a context manager, used like a function)
    """Put the model in eval mode and turn whatever stops the capture into a TraceError; the model stays as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.contexts = ExitStack()

    def __enter__(self) -> None:
        self.contexts.enter_context(module_kept(self.model))
        self.contexts.enter_context(uncached_fake_tensors())
        if any(tensor.is_inference() for tensor in chain(self.model.parameters(), self.model.buffers())):
            self.contexts.enter_context(torch.inference_mode())  # outside of it export cannot prepare such tensors
        self.model.eval()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.contexts.close()
        if isinstance(error, Exception) and not isinstance(error, TraceError):
            raise TraceError(_explain(self.model, error)) from error


def widen_batch(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Repeat a batch of 1 to 2 where every tensor input has one: export bakes dimensions of 0 or 1 in."""
    leaves = [leaf for leaf in pytree.tree_leaves(dict(inputs)) if isinstance(leaf, Tensor)]
    if not leaves or any(leaf.dim() == 0 or leaf.shape[0] != 1 for leaf in leaves):
        return dict(inputs)
    widened: dict[str, Any] = pytree.tree_map_only(Tensor, lambda t: t.repeat(2, *[1] * (t.dim() - 1)), dict(inputs))
    return widened


def _dynamic_dimensions(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return None
    return {d: Dim.AUTO if size > 1 else Dim.STATIC for d, size in enumerate(leaf.shape)}


def _explain(model: nn.Module, error: Exception) -> str:
    """Name the innermost module whose forward was running, the source line, and what to do."""
    names = {module: name for name, module in model.named_modules()}
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        code = frame.f_code
        if isinstance(module, nn.Module) and module in names and "torch/nn/modules/module.py" not in code.co_filename:
            path = names[module] or "the model itself"
            where = f"{path} ({type(module).__name__}), {code.co_filename}:{line} in {code.co_name}"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"cannot trace {type(model).__name__} as one graph. At {where or inspect.getfile(type(model))}:"
        f" {type(error).__name__}: {first.rstrip('.')}. Remedy: {remedy_for(error)}."
    )
