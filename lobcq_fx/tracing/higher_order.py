"""Refuse graphs with graphs in them: nothing inside would be found, quantized or saved."""

from __future__ import annotations

import re

from torch import fx
from torch._ops import HigherOrderOperator

from lobcq_fx.errors import TraceError

REMEDIES = {
    "cond": "choose between the branches' results with torch.where",
    "vmap": "write the mapped dimension out as a batch dimension",
    "wrap_with_autocast": "take the torch.autocast region out, and cast the model or its tensors instead",
    "wrap_with_set_grad_enabled": "take out what switches gradients on: a quantized model has none",
}
OTHERWISE = "quantize the submodules around it one by one"


def refuse_higher_order(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph module, if each of its nodes is one operation.

    Raises:
        TraceError: names the operation that runs a graph of its own, and the line of the model that calls it.
    """
    for node in graph_module.graph.nodes:
        name = _name(node)
        if name is not None:
            remedy = f"{REMEDIES[name]}, or {OTHERWISE}" if name in REMEDIES else OTHERWISE
            raise TraceError(
                f"the model runs {name}{_place(node)}, whose graph is hidden inside its own: no matmul in it would be"
                f" found. Remedy: {remedy}"
            )
    return graph_module


def _name(node: fx.Node) -> str | None:
    """Of an operation that runs a graph of its own."""
    if node.op != "call_function":
        return None
    if isinstance(node.target, HigherOrderOperator):
        return str(node.target)
    return "vmap" if getattr(node.target, "__module__", "").startswith("torch._functorch") else None


def _place(node: fx.Node) -> str:
    """Where the model calls it, if the trace says so."""
    lines = re.findall(r'File "[^<].*', node.meta.get("stack_trace", ""))  # "<...": code that was made up
    return f" ({lines[-1]})" if lines else ""
