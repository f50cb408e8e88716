"""Pass: put an observer on the activation operand of every matmul that is to be quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.graph.attributes import register_attribute
from lobcq_fx.graph.matmuls import Matmul
from lobcq_fx.passes.infra import Condition, GraphPass
from lobcq_fx.passes.normalize_matmuls import normal_form
from lobcq_fx.plan import PlannedMatmul, QuantizationPlan

PREFIX = "lobcq_observers"


class Observer(nn.Module):
    """Passes its input through and adds it to the statistics."""

    def __init__(self, statistics: ActivationStatistics, grouped: bool = False) -> None:
        super().__init__()
        self.statistics = statistics
        self.grouped = grouped

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """x [..., K] unchanged; offsets: where the groups of its rows end, one for each expert."""
        if self.grouped:
            self.statistics.update_groups(x, offsets)
        else:
            self.statistics.update(x)
        return x


class PastObservers(fx.Interpreter):
    """Runs a graph whose observers see nothing of it."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A submodule, an observer's input for an observer."""
        assert isinstance(self.module, fx.GraphModule)
        module = self.module.get_submodule(target)
        return args[0] if isinstance(module, Observer) else module(*args, **kwargs)


@dataclass(frozen=True)
class InsertObservers(GraphPass):
    """One observer for each distinct activation operand: q, k and v share theirs."""

    name: ClassVar[str] = "insert_observers"
    requires: ClassVar[tuple[Condition, ...]] = (normal_form,)

    plan: QuantizationPlan

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Insert `call_module` nodes; their statistics are named after the first layer that reads the activation."""
        by_activation: dict[fx.Node, list[tuple[Matmul, PlannedMatmul]]] = {}
        for matmul, planned in self.plan.pair(graph_module):
            if planned.weight is not None and _observer(graph_module, matmul.activation) is None:
                by_activation.setdefault(matmul.activation, []).append((matmul, planned))
        for index, (activation, reading) in enumerate(by_activation.items()):
            matmul, first = reading[0]
            target = f"{PREFIX}.{index}"
            statistics = ActivationStatistics(first.layer, first.config.activations)
            register_attribute(graph_module, target, Observer(statistics, matmul.grouped))
            graph, offsets = graph_module.graph, matmul.offsets
            if offsets is None:
                with graph.inserting_after(activation):
                    observer = graph.call_module(target, (activation,))
            else:  # which may be known only after the activation
                with graph.inserting_before(matmul.node):
                    observer = graph.call_module(target, (activation, offsets))
            observer.meta = {"val": activation.meta.get("val")}
            for reader, _ in reading:
                reader.node.replace_input_with(activation, observer)
        return bool(by_activation)


def observed(graph_module: fx.GraphModule, plan: QuantizationPlan) -> dict[PlannedMatmul, ActivationStatistics]:
    """What the observers of a graph have seen, for the matmuls that have one."""
    found = {}
    for matmul, planned in plan.pair(graph_module):
        observer = None if planned.weight is None else _observer(graph_module, matmul.activation)
        if observer is not None:
            found[planned] = observer.statistics
    return found


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
