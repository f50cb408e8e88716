"""Running the linears of graphs by themselves: a Triton kernel is compiled when it first runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.graph.prepacked_calls import PrepackedCall, prepacked_calls, value_of

ACTIVATIONS = ("x", "gate", "up", "residual")
"""Arguments [..., K] of the overloads of `lobcq::linear_prepacked`."""


@torch.no_grad()
def run_on_zeros(graph_modules: Iterable[fx.GraphModule], rows: int) -> int:
    """Call every distinct `lobcq::linear_prepacked`, of any overload, on activations [rows, K] of zeros.

    Calls that differ in the values of their weights alone are not distinct.

    Returns:
        How many ran.
    """
    packet = torch.ops.lobcq.linear_prepacked
    overloads = [getattr(packet, name) for name in packet.overloads()]
    seen = set()
    for graph_module in graph_modules:
        for call in prepacked_calls(graph_module.graph, *overloads):
            arguments, target = _arguments(graph_module, call, rows), call.node.target
            key = (target, repr([_kind(argument) for argument in arguments]))
            if key not in seen:
                seen.add(key)
                target(*arguments)  # type: ignore[operator]
    return len(seen)


def _arguments(graph_module: fx.GraphModule, call: PrepackedCall, rows: int) -> list[Any]:
    """The call's own constants, and zeros for what the graph computes."""
    weight = get_attribute(graph_module, str(call.weights[0].target).rpartition(".")[0])
    device = weight.prepacked.device
    dtype = _dtype(call)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def value(name: str, argument: Any, columns: int) -> Any:
        if isinstance(argument, (list, tuple)):
            widths = call.arguments["out_features"] if name == "residuals" else [columns] * len(argument)
            return [value(name, one, width) for one, width in zip(argument, widths, strict=True)]
        if not isinstance(argument, fx.Node):
            return argument
        if argument.op == "get_attr":
            return get_attribute(graph_module, str(argument.target))
        return zeros(rows, columns) if name in (*ACTIVATIONS, "residuals") else zeros(columns)

    return [value(name, argument, weight.columns) for name, argument in call.arguments.items()]


def _dtype(call: PrepackedCall) -> torch.dtype:
    """The activation's; without metadata the results', which it is in every model that was traced."""
    known = next((value_of(call.arguments[name]) for name in ACTIVATIONS if name in call.arguments), None)
    if known is not None:
        return known.dtype
    dtype: torch.dtype = call.arguments.get("dtype", torch.float32)
    return dtype


def _kind(argument: Any) -> Any:
    """What kernels are compiled for: shapes and dtypes of tensors, values of all else."""
    if isinstance(argument, list):
        return [_kind(one) for one in argument]
    return (argument.shape, argument.dtype) if isinstance(argument, Tensor) else argument
