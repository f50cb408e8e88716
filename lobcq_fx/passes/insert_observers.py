"""Pass: put an observer on the activation operand of every matmul that is to be quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx, nn

from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.config import LobcqConfig
from lobcq_fx.graph.attributes import register_attribute
from lobcq_fx.graph.matmuls import Matmul, find_matmuls
from lobcq_fx.passes.infra import GraphPass

PREFIX = "lobcq_observers"


class Observer(nn.Module):
    """Passes its input through and adds it to the statistics."""

    def __init__(self, statistics: ActivationStatistics) -> None:
        super().__init__()
        self.statistics = statistics

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] unchanged."""
        self.statistics.update(x)
        return x


@dataclass(frozen=True)
class InsertObservers(GraphPass):
    """One observer for each distinct activation operand: q, k and v share theirs."""

    name: ClassVar[str] = "insert_observers"

    config: LobcqConfig

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Insert `call_module` nodes named after the first layer that reads the activation."""
        by_activation: dict[fx.Node, list[Matmul]] = {}
        for matmul in find_matmuls(graph_module, self.config):
            if matmul.refusal is None and observer_of(graph_module, matmul) is None:
                by_activation.setdefault(matmul.activation, []).append(matmul)
        for index, (activation, matmuls) in enumerate(by_activation.items()):
            target = f"{PREFIX}.{index}"
            statistics = ActivationStatistics(matmuls[0].layer, matmuls[0].config.format)
            register_attribute(graph_module, target, Observer(statistics))
            with graph_module.graph.inserting_after(activation):
                node = graph_module.graph.call_module(target, (activation,))
            node.meta = {"val": activation.meta.get("val")}
            for matmul in matmuls:
                matmul.node.replace_input_with(activation, node)
        return bool(by_activation)


def observer_of(graph_module: fx.GraphModule, matmul: Matmul) -> Observer | None:
    """The observer on the matmul's activation, or None."""
    node = matmul.activation
    if node.op != "call_module":
        return None
    module = graph_module.get_submodule(str(node.target))
    return module if isinstance(module, Observer) else None


def scaled_sample(statistics: ActivationStatistics, config: LobcqConfig) -> Tensor:
    """Sampled block arrays [n, L_A] in units of the tensor scales that the settings will give them.

    Raises:
        CalibrationError: the layer saw no data.
    """
    if config.activation_scale == "static":
        return statistics.sample() / statistics.static_tensor_scale()
    return statistics.sample_in_row_scales()
