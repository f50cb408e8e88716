"""Pass: put an observer on the activation operand of every matmul that is to be quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from lobcq_fx.calibration.groups import SeenRows
from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.graph.aliasing import Writes
from lobcq_fx.graph.attributes import register_attribute
from lobcq_fx.graph.matmuls import Matmul
from lobcq_fx.passes.infra import Condition, GraphPass
from lobcq_fx.passes.normalize_matmuls import normal_form
from lobcq_fx.plan import PlannedMatmul, QuantizationPlan

PREFIX = "lobcq_observers"


class Observer(nn.Module):
    """Passes its input through and adds it to the statistics, and to what second moments are made of if it has that."""

    def __init__(self, statistics: ActivationStatistics, grouped: bool = False, rows: SeenRows | None = None) -> None:
        super().__init__()
        self.statistics = statistics
        self.grouped = grouped
        self.rows = rows

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """x [..., K] unchanged; offsets: where the groups of its rows end, one for each expert."""
        if self.grouped:
            self.statistics.update_groups(x, offsets)
        else:
            self.statistics.update(x)
        if self.rows is not None and self.grouped:
            self.rows.add_groups(x, offsets)
        elif self.rows is not None:
            self.rows.add(x)
        return x

    def state(self) -> dict[str, Any]:
        """What it has gathered, for `restore`: numbers and tensors."""
        return {"statistics": self.statistics.state(), "rows": None if self.rows is None else self.rows.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another one, of the same activation, was."""
        self.statistics.restore(state["statistics"])
        if self.rows is not None:
            self.rows.restore(state["rows"])


class PastObservers(fx.Interpreter):
    """Runs a graph whose observers see nothing of it."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A submodule, an observer's input for an observer."""
        assert isinstance(self.module, fx.GraphModule)
        module = self.module.get_submodule(target)
        return args[0] if isinstance(module, Observer) else module(*args, **kwargs)


@dataclass(frozen=True)
class InsertObservers(GraphPass):
    """One observer for each distinct activation operand: q, k and v share theirs, unless it is written to meanwhile."""

    name: ClassVar[str] = "insert_observers"
    requires: ClassVar[tuple[Condition, ...]] = (normal_form,)

    plan: QuantizationPlan
    moments: bool = False
    """Whether to gather second moments too, of what compensated weights meet."""

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Insert `call_module` nodes; their statistics are named after the first layer that reads the activation."""
        found = {matmul.node: (matmul, planned) for matmul, planned in self.plan.pair(graph_module)}
        by_values: dict[tuple[fx.Node, int], list[tuple[Matmul, PlannedMatmul]]] = {}
        writes = Writes()
        for node in graph_module.graph.nodes:
            if node in found:
                matmul, planned = found[node]
                if planned.weight is not None and _observer(graph_module, matmul.activation) is None:
                    key = matmul.activation, writes.before(matmul.activation)
                    by_values.setdefault(key, []).append((matmul, planned))
            writes.visit(node)
        for index, reading in enumerate(by_values.values()):
            self._insert(graph_module, f"{PREFIX}.{index}", reading)
        return bool(by_values)

    def _insert(self, graph_module: fx.GraphModule, target: str, reading: list[tuple[Matmul, PlannedMatmul]]) -> None:
        """One observer, before the first matmul that reads the activation with the values that it sees."""
        matmul, first = reading[0]
        compensated = self.moments and any(planned.compensated for _, planned in reading)
        statistics = ActivationStatistics(first.layer, first.config.activations)
        register_attribute(
            graph_module, target, Observer(statistics, matmul.grouped, SeenRows() if compensated else None)
        )
        activation = matmul.activation
        with graph_module.graph.inserting_before(matmul.node):
            args = (activation,) if matmul.offsets is None else (activation, matmul.offsets)
            observer = graph_module.graph.call_module(target, args)
        observer.meta = {"val": activation.meta.get("val")}
        for reader, _ in reading:
            reader.node.replace_input_with(activation, observer)


def observed(graph_module: fx.GraphModule, plan: QuantizationPlan) -> dict[PlannedMatmul, ActivationStatistics]:
    """What the observers of a graph have seen, for the matmuls that have one."""
    found = {}
    for matmul, planned in plan.pair(graph_module):
        observer = None if planned.weight is None else _observer(graph_module, matmul.activation)
        if observer is not None:
            found[planned] = observer.statistics
    return found


def seen_rows(graph_module: fx.GraphModule, plan: QuantizationPlan) -> dict[PlannedMatmul, SeenRows]:
    """What second moments are made of, for the matmuls whose observer has gathered it."""
    observers = {planned: _observer(graph_module, matmul.activation) for matmul, planned in plan.pair(graph_module)}
    return {one: found.rows for one, found in observers.items() if found is not None and found.rows is not None}


def observers_of(graph_module: fx.GraphModule) -> list[Observer]:
    """All of a graph, in the order in which they were inserted."""
    return [one for one in graph_module.modules() if isinstance(one, Observer)]


def unobserved(graph_module: fx.GraphModule, activation: fx.Node) -> fx.Node:
    """The activation itself, behind its observer if it has one."""
    if _observer(graph_module, activation) is None:
        return activation
    behind = activation.args[0]
    assert isinstance(behind, fx.Node)
    return behind


def _observer(graph_module: fx.GraphModule, activation: fx.Node) -> Observer | None:
    if activation.op != "call_module":
        return None
    module = graph_module.get_submodule(str(activation.target))
    return module if isinstance(module, Observer) else None
