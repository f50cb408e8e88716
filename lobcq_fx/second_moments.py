"""Second moments of activations, in execution order: only one activation's are held at a time.

All calls go through the graph together, each up to the activation that is asked for, and wait there. So a model's
layers can be encoded one after the other, in the memory that one of them takes, by one run of the float model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lobcq_fx.calibration.groups import GroupMoments, Groups, Moments, second_moments
from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.graph.aliasing import writes_inputs, written_attributes, written_between
from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.graph.dead_code import has_effects
from lobcq_fx.passes.insert_observers import PastObservers, unobserved
from lobcq_fx.plan import PlannedMatmul, PlannedWeight, QuantizationPlan


@dataclass(frozen=True)
class _Gate:
    """Where all calls wait for one another: an activation, before the first matmul that reads it.

    grouped: its rows are of groups. offsets: where these end, None where group e is [e, :].
    changes: something writes to the activation later on.
    place: in what is run, of the first that comes after it.
    """

    activation: fx.Node
    reader: fx.Node
    matmuls: tuple[PlannedMatmul, ...]
    grouped: bool = False
    offsets: fx.Node | None = None
    changes: bool = False
    place: int = 0

    @property
    def read(self) -> list[fx.Node]:
        """What has to be there."""
        return [self.activation] if self.offsets is None else [self.activation, self.offsets]


class SecondMoments:
    """Of what the weights of a plan are multiplied with, where rounding is compensated.

    The graph module may lose its weights, and get other parameters, after this is made: what the graph reads is kept
    here until it has been read.
    """

    def __init__(self, graph_module: fx.GraphModule, plan: QuantizationPlan, calls: Sequence[Sequence[Any]]) -> None:
        """
        Args:
            graph_module: what the plan was made of, with observers or without.
            plan: which weights are to be compensated.
            calls: flat inputs of the graph, one sequence for each call.
        """
        self._plan = plan
        gates = _gates(plan, graph_module)
        nodes = list(graph_module.graph.nodes)
        self._order = _order(nodes, gates)
        self._gates = [replace(gate, place=_place(self._order, nodes[: nodes.index(gate.reader)])) for gate in gates]
        self._dying = _dying(self._order, self._gates)
        names = {str(node.target) for node in self._order if node.op == "get_attr"}
        values = {name: get_attribute(graph_module, name) for name in names}
        self._values = {name: one.detach() if isinstance(one, Tensor) else one for name, one in values.items()}
        own = set(written_attributes(graph_module.graph)) & names
        written = writes_inputs(graph_module.graph)
        self._calls = [
            _Call(graph_module, self._values, own, [one.clone() for one in inputs] if written else inputs)
            for inputs in calls
        ]

    def of_weights(
        self, statistics: Mapping[PlannedMatmul, ActivationStatistics]
    ) -> Iterator[tuple[PlannedWeight, Moments | None]]:
        """Every weight of the plan once, with the sums of x^T x over all x it meets, as they are encoded.

        Weights that are not compensated come first, with None; then each as soon as all that it meets was seen.

        Args:
            statistics: say what becomes of an activation before it is encoded.
        """
        waiting = Counter(matmul.weight for gate in self._gates for matmul in gate.matmuls)
        yield from ((weight, None) for weight in self._plan.weights if weight not in waiting)
        sums: dict[PlannedWeight, Any] = {}
        for matmuls, seen in self._in_order():
            encoded: dict[int, Moments] = {}  # for each of the statistics, of which siblings have the same
            for matmul in matmuls:
                weight, of_matmul = matmul.weight, statistics[matmul]
                assert weight is not None
                if id(of_matmul) not in encoded:
                    encoded[id(of_matmul)] = _encoded(seen, of_matmul)
                found = encoded[id(of_matmul)]
                sums[weight] = sums[weight] + found if weight in sums else found
                waiting[weight] -= 1
                if not waiting[weight]:
                    yield weight, sums.pop(weight)

    def _in_order(self) -> Iterator[tuple[tuple[PlannedMatmul, ...], Tensor | list[Groups]]]:
        """Of each activation the moments, or its groups in each call, once all calls have gone on to the next one."""
        if not self._gates:
            return
        for call in self._calls:
            self._run(call, 0, self._gates[0].place)
        ends = [gate.place for gate in self._gates[1:]] + [len(self._order)]
        for gate, end in zip(self._gates, ends, strict=True):
            seen: Tensor | list[Groups]
            if gate.grouped:
                seen = [_groups(gate, call) for call in self._calls]
            else:
                seen = second_moments(call.env[gate.activation] for call in self._calls)
            for call in self._calls:
                self._run(call, gate.place, end)
            self._forget(end)
            yield gate.matmuls, seen

    @torch.inference_mode()
    def _run(self, call: _Call, first: int, end: int) -> None:
        for place, node in enumerate(self._order[first:end], start=first):
            call.env[node] = call.run_node(node)
            for dead in self._dying.get(place, ()):
                call.env.pop(dead, None)

    def _forget(self, end: int) -> None:
        """Let go of tensors that no node from there on reads, those that were read already excepted."""
        ahead = {str(node.target) for node in self._order[end:] if node.op == "get_attr"}
        for name in self._values.keys() - ahead:
            del self._values[name]


def _groups(gate: _Gate, call: _Call) -> Groups:
    """Of an activation in a call, as it is now."""
    x = call.env[gate.activation]
    offsets = None if gate.offsets is None else call.env[gate.offsets]
    return Groups.of(x.clone() if gate.changes else x, offsets)


def _encoded(seen: Tensor | list[Groups], statistics: ActivationStatistics) -> Moments:
    if isinstance(seen, Tensor):
        return statistics.encoded_moments(seen)
    return GroupMoments(seen, statistics.encoded_moments)


class _Call(PastObservers):
    """One call of a graph, whose values are kept between nodes.

    values: what the graph reads. own: names of those that it writes to, of which each call has its own.
    """

    def __init__(
        self, graph_module: fx.GraphModule, values: Mapping[str, Any], own: Iterable[str], inputs: Sequence[Any]
    ) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self._values = values
        self._own = {name: values[name].clone() for name in own}
        self.args_iter = iter(inputs)

    def fetch_attr(self, target: str) -> Any:
        """From what was kept."""
        return self._own[target] if target in self._own else self._values[target]


def _gates(plan: QuantizationPlan, graph_module: fx.GraphModule) -> list[_Gate]:
    """In execution order; one for all matmuls that read an activation with the same values in it."""
    gates: list[_Gate] = []
    open_gates: dict[fx.Node, int] = {}
    (end,) = graph_module.graph.find_nodes(op="output")
    for matmul, planned in plan.pair(graph_module):
        if not planned.compensated:
            continue
        x, known = matmul.activation, open_gates.get(matmul.activation)
        if known is None or written_between(gates[known].reader, matmul.node, [unobserved(graph_module, x)]):
            open_gates[x] = len(gates)
            changes = written_between(matmul.node, end, [unobserved(graph_module, x)])
            gates.append(_Gate(x, matmul.node, (planned,), matmul.grouped, matmul.offsets, changes))
        else:
            gates[known] = replace(gates[known], matmuls=(*gates[known].matmuls, planned))
    return gates


def _order(nodes: Sequence[fx.Node], gates: Sequence[_Gate]) -> list[fx.Node]:
    """What has to run before the last gate, and what changes what others see; attributes before their first reader."""
    last = gates[-1].reader if gates else None
    before = nodes[: nodes.index(last)] if last is not None else []
    needed = {node for gate in gates for node in gate.read}
    for node in reversed(before):
        if node in needed or node.op == "placeholder" or has_effects(node):
            needed.update((node, *node.all_input_nodes))
    order: dict[fx.Node, None] = {}
    for node in before:
        if node in needed and node.op != "get_attr":
            order.update(dict.fromkeys(one for one in node.all_input_nodes if one.op == "get_attr"))
            order[node] = None
    return list(order)


def _place(order: Sequence[fx.Node], before: Sequence[fx.Node]) -> int:
    """Where what comes before a node in the graph has run, and nothing else."""
    earlier = set(before)
    place = next((i for i, node in enumerate(order) if node.op != "get_attr" and node not in earlier), len(order))
    while place and order[place - 1].op == "get_attr":
        place -= 1
    return place


def _dying(order: Sequence[fx.Node], gates: Sequence[_Gate]) -> dict[int, list[fx.Node]]:
    """By place, what nobody reads once that node has run. What a gate reads stays until a node after it has."""
    last: dict[fx.Node, int] = {}
    for place, node in enumerate(order):
        last[node] = place
        last.update(dict.fromkeys(node.all_input_nodes, place))
    for gate in gates:
        last.update({node: max(last[node], gate.place) for node in gate.read})
    dying: dict[int, list[fx.Node]] = {}
    for node, place in last.items():
        dying.setdefault(place, []).append(node)
    return dying
