"""Pass: linears that read one activation become one call, which encodes it once.

linear_prepacked(x, [w_q]); linear_prepacked(x, [w_k])  ->  linear_prepacked(x, [w_q, w_k])
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from lobcq_fx.graph.aliasing import Writes
from lobcq_fx.graph.attributes import add_call
from lobcq_fx.graph.prepacked_calls import PrepackedCall
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.refusal import Refusal

linear_prepacked = torch.ops.lobcq.linear_prepacked

_PER_LINEAR = ("weights", "tensor_scales", "biases", "out_features")
"""Arguments that are lists, one element for each linear."""

_WORDS = {
    "activation_tables": "activation format",
    "weight_tables": "codebook set",
    "array_size": "array size",
    "static_scale": "static scale",
    "rotated": "rotation",
}


@dataclass(frozen=True)
class _Group:
    """Calls that one can stand for: those with the same `arguments`, of an activation written to `writes` times."""

    writes: int
    arguments: dict[str, Any]
    calls: list[PrepackedCall] = field(default_factory=list)


@dataclass(frozen=True)
class MergeSiblings(GraphPass):
    """Merge calls of `lobcq::linear_prepacked`, or of its `.float_activation`, that differ in their one weight alone.

    It refuses calls that read the activation of others and stay apart.
    """

    name: ClassVar[str] = "merge_siblings"

    def attempt(self, graph_module: fx.GraphModule) -> tuple[bool, list[Refusal]]:
        """Each group becomes one call where its first one stands."""
        groups: dict[tuple[Any, Any], list[_Group]] = {}
        refusals: list[Refusal] = []
        writes = Writes()
        for node in graph_module.graph.nodes:
            writes.visit(node)
            if node.op == "call_function" and node.target in (
                linear_prepacked.default,
                linear_prepacked.float_activation,
            ):
                call = PrepackedCall(node)
                if len(call.weights) > 1:  # merged already
                    continue
                x = call.arguments["x"]
                refusals += self._add(call, groups.setdefault((node.target, x), []), writes.before(x))
        merged = [group.calls for candidates in groups.values() for group in candidates if len(group.calls) > 1]
        for calls in merged:
            _merge(graph_module.graph, calls)
        return bool(merged), refusals

    def _add(self, call: PrepackedCall, groups: list[_Group], writes: int) -> list[Refusal]:
        """Put a call into the group it belongs to, or into one of its own; say what sets it apart from the first."""
        arguments = {name: value for name, value in call.arguments.items() if name not in _PER_LINEAR}
        for group in groups:
            if (group.writes, group.arguments) == (writes, arguments):
                group.calls.append(call)
                return []
        refusals = []
        for group in groups[:1]:
            reason = _difference(group, writes, arguments).format(group.calls[0].layers[0])
            refusals.append(Refusal(self.name, call.layers[0], reason))
        groups.append(_Group(writes, arguments, [call]))
        return refusals


def _difference(group: _Group, writes: int, arguments: dict[str, Any]) -> str:
    """What sets a call apart from a group, with {} for the group's first layer."""
    if group.writes != writes:
        return "its activation was written to after {} had read it"
    name = next(name for name, value in arguments.items() if group.arguments[name] != value)
    return f"it reads the activation of {{}} with another {_WORDS.get(name, name)}"


def _merge(graph: fx.Graph, calls: list[PrepackedCall]) -> None:
    lists = {name: [element for call in calls for element in call.arguments[name]] for name in _PER_LINEAR}
    merged = calls[0].replace(calls[0].node.target, lists)
    for index, call in enumerate(calls[1:], start=1):
        result = call.result(0)
        if result is not None:
            with graph.inserting_before(call.node):
                result.replace_all_uses_with(add_call(graph, operator.getitem, (merged, index), like=result))
            graph.erase_node(result)
        graph.erase_node(call.node)
