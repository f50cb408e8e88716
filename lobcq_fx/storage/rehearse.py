"""A graph from a file is run once, on tensors without memory, before anybody calls it.

Files hold what a graph's inputs were when it was traced. With tensors of these sizes and of no content every operator
says whether it takes its operands, and how large its result is, at the cost of a few microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lobcq_fx.errors import CheckpointError
from lobcq_fx.graph.stored_linear import LINEARS, StoredLinear
from lobcq_fx.tracing.autocast import no_autocast
from lobcq_fx.tracing.example import InputExample

META = torch.device("meta")

LARGEST_RESULT = 2**30
"""Bytes of one result, or sixteen times the model's tensors and inputs, if that is more."""


@torch.no_grad()
def rehearse(graphs: Sequence[fx.Graph], tensors: Mapping[str, Tensor]) -> None:
    """Run graphs on the sizes of their examples; one of a release that wrote no examples is taken as it is.

    Raises:
        CheckpointError: names the node that does not take its operands, or whose result is absurdly large.
    """
    rehearsal = _Rehearsal(tensors)
    with no_autocast():
        for graph in graphs:
            rehearsal.run(graph)


class _Rehearsal:
    """Runs graphs. What has no content is equal where it is described alike, so that layers that are alike cost once:
    each description is one tensor, and each call of an operator on the same tensors is made once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.described: dict[Any, Tensor] = {}
        self.results: dict[Any, Any] = {}
        self.stored = sum(tensor.nbytes for tensor in tensors.values())

    def run(self, graph: fx.Graph) -> None:
        examples = {node: InputExample.of(node) for node in graph.find_nodes(op="placeholder")}
        values: dict[fx.Node, Any] = {}
        for node, example in examples.items():
            if example is None:
                return
            values[node] = torch.empty(example.shape, dtype=getattr(torch, example.dtype), device=META)
        largest = max(LARGEST_RESULT, 16 * (self.stored + sum(value.nbytes for value in values.values())))
        for node in graph.nodes:
            if node.op == "get_attr":
                values[node] = self._describe(self.tensors[str(node.target)])
            elif node.op == "call_function":
                try:
                    values[node] = self._call(node, values)
                except NotImplementedError:  # its sizes follow from values, as those of a mask's selection do
                    return
                except Exception as error:  # whatever an operator raises for operands that are none of its own
                    text = next(iter(str(error).splitlines()), "")
                    raise CheckpointError(
                        f"graph.json: node {node.name!r} does not take its operands: {type(error).__name__}: {text}"
                    ) from None
                _check_size(node, values[node], largest)
                if node.target in LINEARS:
                    _check_linear(StoredLinear(node), values)

    def _describe(self, tensor: Any) -> Any:
        """The one tensor that stands for all that look like this; numbers as they are."""
        if not isinstance(tensor, Tensor):
            return tensor
        key = (tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self.described:
            self.described[key] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
        return self.described[key]

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        operands: list[Any] = []

        def value(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                argument = values[argument]
            elif isinstance(argument, torch.device):
                argument = META
            operands.append(argument)
            return argument

        args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), value)
        form = fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda _: None)
        key = (node.target, repr(form), tuple(_identity(one) for one in operands))
        if key not in self.results:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
            self.results[key] = (fx.node.map_aggregate(result, self._describe), operands)
        return self.results[key][0]


def _identity(operand: Any) -> Any:
    """Equal for operands that an operator cannot tell apart, as long as they live."""
    if isinstance(operand, (int, float, str, bool)):
        return type(operand), operand if operand == operand else None
    return id(operand)


def _check_linear(linear: StoredLinear, values: Mapping[fx.Node, Any]) -> None:
    """What our kernels check as they run, and their fakes do not."""
    arguments, activation = linear.arguments, linear.activation
    if activation is None:
        return  # `restore_packed_weights` names it
    x, codes, scales = (values[node] for node in (activation, arguments["w_codes"], arguments["w_scales"]))
    columns = arguments.get("in_features", x.shape[-1])
    bias = None if linear.bias is None else values[linear.bias]
    fits = x.dtype.is_floating_point and arguments.get("dtype", x.dtype).is_floating_point and x.shape[-1] == columns
    fits &= -(-columns // linear.array_size) == scales.shape[-1]
    if linear.grouped:
        _check_groups(linear, values, x, codes)
    if not fits or (bias is not None and (bias.shape != codes.shape[:1] or not bias.dtype.is_floating_point)):
        raise CheckpointError(
            f"graph.json: node {linear.node.name!r} multiplies a {x.dtype} of {list(x.shape)} by"
            f" {linear.weight}, which has {codes.shape[-2]} rows of {columns}"
        )


def _check_groups(linear: StoredLinear, values: Mapping[fx.Node, Any], x: Tensor, codes: Tensor) -> None:
    """Ends of as many groups of rows as there are matrices. What ends and rows are is checked as they are used."""
    offsets, rows = (None if one is None else values[one] for one in linear.groups)
    groups = x.shape[:1] if offsets is None else offsets.shape
    fits = groups == codes.shape[:1] and (offsets is None or offsets.dtype == torch.int32)
    if not fits or (rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64)):
        raise CheckpointError(
            f"graph.json: node {linear.node.name!r} cuts rows into {list(groups)} groups for {linear.weight}, which has"
            f" {codes.shape[0]} matrices"
        )


def _check_size(node: fx.Node, result: Any, largest: int) -> None:
    for one in result if isinstance(result, (list, tuple)) else (result,):
        if isinstance(one, Tensor) and one.numel() * one.element_size() > largest:
            raise CheckpointError(
                f"graph.json: node {node.name!r} makes a {one.dtype} of {list(one.shape)} of the example's inputs,"
                f" which is more than {largest:,} bytes"
            )
