"""Calling conventions: from a call of the model to a call of its flat graph, and from flat outputs back.

They run inside the quantized model's forward, so they stay simple enough for Dynamo to trace.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import UserDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lobcq_fx.errors import CallError, TraceError
from lobcq_fx.tracing.guards import SizeGuards
from lobcq_fx.tracing.structure import Structure


class CallingConvention(ABC):
    """How one kind of model is called."""

    kind: ClassVar[str]

    @abstractmethod
    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The graph's inputs for a call of the model.

        Raises:
            CallError: the traced graph cannot serve the call.
        """

    @abstractmethod
    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model would have returned, from the graph's outputs and the call they answer."""

    @property
    @abstractmethod
    def arity(self) -> tuple[int, int]:
        """How many inputs and outputs the graph has."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""


@dataclass(frozen=True)
class ModuleCall(CallingConvention):
    """Calls of any nn.Module: the structure of the example's arguments and outputs, kept.

    names: forward's parameters in order. inputs: structure of {name: value} as traced. constants: leaf position ->
    value that was baked into the graph. outputs: structure of what forward returned. shapes: of the tensors, in order,
    None where a dimension is dynamic; a graph gives wrong results, not errors, for sizes it was not traced for. fills:
    arguments that a call may leave out, as an int64 tensor of this number in the shape of the first traced argument.
    guards: what the trace assumed of dynamic sizes. settings: flags that the graph was traced with, {name: value}: a
    call may say so, and nothing else.
    """

    kind: ClassVar[str] = "module"

    names: tuple[str, ...]
    inputs: Structure
    constants: Mapping[int, Any]
    outputs: Structure
    shapes: tuple[tuple[int | None, ...], ...]
    fills: Mapping[str, int] = field(default_factory=dict)
    guards: SizeGuards = field(default_factory=SizeGuards)
    settings: Mapping[str, bool] = field(default_factory=dict)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors among the arguments, in traced order."""
        traced = self.inputs.spec.context
        given = self._bind(args, kwargs)
        for name, value in self.settings.items():
            said = given.pop(name, value)
            if said != value:
                raise CallError(
                    f"argument {name!r} is {said!r}; the graph was traced with {value}, which is part of it: leave it"
                    " out, or quantize again with it in example_inputs"
                )
        for name in given:
            if name not in traced:
                raise CallError(f"argument {name!r} was not in the traced call, which takes {', '.join(traced)}")
        for name in traced:
            if name not in given and name in self.fills and traced[0] in given:
                given[name] = torch.full_like(given[traced[0]], self.fills[name], dtype=torch.long)
            elif name not in given:
                raise CallError(f"argument {name!r} is missing; the traced call takes {', '.join(traced)}")
        try:
            leaves = self.inputs.spec.flatten_up_to({name: given[name] for name in traced})
        except ValueError as error:
            raise CallError(f"an argument is not built as in the traced call: {error}") from None
        for index, value in self.constants.items():
            if isinstance(leaves[index], Tensor) or leaves[index] != value:
                raise CallError(
                    f"argument {self._name(index)} is {leaves[index]!r}; the graph was traced with {value!r}, which is"
                    " part of it: quantize again with example_inputs that have the other value"
                )
        tensors = [index for index in range(len(leaves)) if index not in self.constants]
        for index, shape in zip(tensors, self.shapes, strict=True):
            self._check(index, leaves[index], shape)
        flat = [leaves[index] for index in tensors]
        self.guards.check(flat, lambda place: self._name(tensors[place]))
        return flat

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """{name: value} of the arguments that are not None."""
        if len(args) > len(self.names):
            raise CallError(f"{len(args)} positional arguments; forward takes {', '.join(self.names)}")
        given = dict(zip(self.names, args, strict=False))
        for name in kwargs:
            if name in given:
                raise CallError(f"argument {name!r} is given twice, by position and by name")
        return {name: plain(value) for name, value in {**given, **kwargs}.items() if value is not None}

    def _check(self, index: int, leaf: Any, shape: tuple[int | None, ...]) -> None:
        if not isinstance(leaf, Tensor):
            raise CallError(f"argument {self._name(index)} is a {type(leaf).__name__}; the traced call had a tensor")
        if leaf.dim() == len(shape) and all(
            size is None or size == actual for size, actual in zip(shape, leaf.shape, strict=True)
        ):
            return
        traced = ", ".join("any" if size is None else str(size) for size in shape)
        raise CallError(
            f"argument {self._name(index)} has shape {list(leaf.shape)}; the graph was traced for [{traced}]: to make a"
            " dimension dynamic, quantize with example_inputs in which it is 2 or more and equal to no constant"
        )

    def _name(self, index: int) -> str:
        """What the caller calls a leaf, for example `batch['ids']`."""
        paths, _ = pytree.tree_flatten_with_path(self.inputs.unflatten(range(self.inputs.spec.num_leaves)))
        (first, *rest), _ = paths[index]
        assert isinstance(first, pytree.MappingKey)
        return f"{first.key}{pytree.keystr(tuple(rest))}"

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs in the traced structure."""
        return self.outputs.unflatten(outputs)

    @property
    def arity(self) -> tuple[int, int]:
        """The tensors of a call, and what forward returned."""
        return len(self.shapes), self.outputs.spec.num_leaves

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "kind": self.kind,
            "names": list(self.names),
            "inputs": self.inputs.to_json(),
            "constants": {str(index): value for index, value in self.constants.items()},
            "outputs": self.outputs.to_json(),
            "shapes": [list(shape) for shape in self.shapes],
            "fills": dict(self.fills),
            "guards": self.guards.to_list(),
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModuleCall:
        """Inverse of `to_dict`; earlier releases wrote no guards and no settings.

        Raises:
            KeyError, TypeError, ValueError: it is damaged, or its parts do not fit each other.
        """
        guards = SizeGuards.from_list(values.get("guards", []))
        guards.validate([len(shape) for shape in values["shapes"]])
        call = cls(
            tuple(values["names"]),
            Structure.from_json(values["inputs"]),
            {int(index): value for index, value in values["constants"].items()},
            Structure.from_json(values["outputs"]),
            tuple(tuple(shape) for shape in values["shapes"]),
            {str(name): int(fill) for name, fill in values["fills"].items()},
            guards,
            {str(name): bool(value) for name, value in values.get("settings", {}).items()},
        )
        call._validate()
        return call

    def _validate(self) -> None:
        """Raise a ValueError where a call would stumble over what a file says."""
        spec = self.inputs.spec
        if spec.type is not dict or not all(isinstance(name, str) for name in (*self.names, *spec.context)):
            raise ValueError("its inputs are not called by name")
        if any(not 0 <= index < spec.num_leaves for index in self.constants):
            raise ValueError("it has a constant in the place of no argument")
        if len(self.shapes) + len(self.constants) != spec.num_leaves:
            raise ValueError(f"it has {len(self.shapes)} shapes for {spec.num_leaves - len(self.constants)} tensors")
        if any(size is not None and type(size) is not int for shape in self.shapes for size in shape):
            raise ValueError("a shape is no list of sizes")
        if any(isinstance(value, (list, dict)) for value in self.constants.values()):
            raise ValueError("a constant is no plain value")
        if any(value.bit_length() > 63 for value in self.fills.values()):
            raise ValueError("a fill is larger than an int64")


def plain(value: Any) -> Any:
    """A tokenizer's output or another UserDict as the dict that it wraps: pytrees know no others."""
    return dict(value) if isinstance(value, UserDict) else value


def bind_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of forward's parameters, and the call as {name: value} in their order, without arguments left at None.

    Raises:
        TraceError: the arguments do not fit forward, or forward takes *args.
    """
    signature = inspect.signature(model.forward)
    _refuse_unnamed(model, signature, len(args))
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}") from None
    inputs: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        named = value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        inputs.update({key: item for key, item in named.items() if item is not None})
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(inputs)):
        raise TraceError(f"example_inputs hold no tensor for {type(model).__name__}.forward{signature}")
    names = tuple(n for n, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD)
    return names, _distinct(inputs)


def _distinct(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with a tensor of its own in each place: torch.export would take one passed twice for one input."""
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) in seen:
            return tensor.clone()
        seen.add(id(tensor))
        return tensor

    distinct: dict[str, Any] = pytree.tree_map_only(Tensor, own, inputs)
    return distinct


def _refuse_unnamed(model: nn.Module, signature: inspect.Signature, count: int) -> None:
    """Refuse *args, and what stands before a `/`: calls and graphs know their inputs by name."""
    parameters = signature.parameters.values()
    unnamed = [p for p in parameters if p.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)]
    if not unnamed:
        return
    last = unnamed[-1]
    if last.kind is inspect.Parameter.VAR_POSITIONAL:
        names = ", ".join(f"{last.name}_{place}" for place in range(max(1, count)))
    else:
        names = ", ".join(parameter.name for parameter in unnamed)
    raise TraceError(
        f"{type(model).__name__}.forward{signature} takes unnamed arguments; wrap it in a module that names them, whose"
        f" forward is `def forward(self, {names}): return self.model({names})`"
    )
