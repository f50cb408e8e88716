"""LO-BCQ as a quantizer of transformers' own exporters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx
from transformers.exporters.configs import ExportFormat
from transformers.exporters.quantizers import ExportQuantizer

from lobcq_fx.config import CALIBRATED, LobcqConfig
from lobcq_fx.errors import CalibrationError
from lobcq_fx.export.convert import add_function_bodies
from lobcq_fx.export.translation import translation_table
from lobcq_fx.integrations.transformers_onnx import extend_onnx_exporter
from lobcq_fx.pipeline import make_plan, quantize_graphs
from lobcq_fx.tracing.trace import MAIN, own_graph_module

# Now: an exporter looks up what it applies before it asks its quantizer anything.
extend_onnx_exporter(translation_table(), add_function_bodies)


class LobcqQuantizer(ExportQuantizer):  # type: ignore[misc]
    """Quantizes a model while transformers exports it: `OnnxConfig(quantizer=LobcqQuantizer())`, or `DynamoConfig`.

    The graph has the operators that `export_onnx` writes, with their function bodies.

    Args:
        config: what to quantize and how; None means `LobcqConfig()`, which needs no calibration.
        calibration_dataset: keyword arguments of calls of the model.
    """

    quantizes_fx_graph = True
    supported_formats = (ExportFormat.DYNAMO, ExportFormat.ONNX)
    required_packages = ("torch",)

    def __init__(
        self, config: LobcqConfig | None = None, calibration_dataset: Iterable[dict[str, Any]] | None = None
    ) -> None:
        super().__init__(calibration_dataset)
        self.config = config or LobcqConfig()

    def validate_environment(self, export_format: ExportFormat) -> None:
        """Refuse what cannot work, before the long work.

        Raises:
            ValueError: a format that has no LO-BCQ operators.
            ConfigError: the settings have a budget of bits.
            CalibrationError: the settings need data and there are none.
        """
        super().validate_environment(export_format)
        self.config.require_decided()
        if self.config.needs_calibration and not self.calibration_dataset:
            raise CalibrationError(f"{CALIBRATED} need data: pass calibration_dataset")

    def quantize(
        self, model: fx.GraphModule, sample_inputs: dict[str, Any], export_format: ExportFormat
    ) -> fx.GraphModule:
        """The exported graph with its matmuls in LO-BCQ, called as before.

        Raises:
            ConfigError: the settings leave nothing to quantize.
        """
        graph_module = own_graph_module(model)
        graphs = {MAIN: graph_module}
        plan, _ = make_plan(graphs, self.config)
        calls = None
        if self.calibration_dataset:
            names = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
            calls = [[inputs[name] for name in names] for inputs in self.traced_calibration(sample_inputs)]
        quantize_graphs(graphs, plan, self.config, calls)
        return graph_module
