"""Pass: describe the value of every node, as tracing does, in a graph that was loaded from a file.

Files hold what a graph's inputs were in the traced example; the rest follows from running the graph on fake tensors.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lobcq_fx.graph.fake_tensors import fake_mode, uncached_fake_tensors
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.tracing.autocast import no_autocast
from lobcq_fx.tracing.example import InputExample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnnotateValues(GraphPass):
    """Fill `meta["val"]` of every node. Graphs that have it, and those whose inputs are unknown, stay as they are.

    So does one that does not run on its examples, with a line in the log: passes then leave more alone.

    Args:
        device: where the inputs are.
    """

    name: ClassVar[str] = "annotate_values"

    device: torch.device

    def transform(self, graph_module: fx.GraphModule) -> bool:
        """Run the graph on fake tensors."""
        examples = [InputExample.of(node) for node in graph_module.graph.find_nodes(op="placeholder")]
        known = [example for example in examples if example is not None]
        if fake_mode(graph_module.graph) is not None or len(known) < len(examples):
            return False
        with uncached_fake_tensors():
            mode = FakeTensorMode(shape_env=ShapeEnv())
        try:
            inputs = [example.fake(mode, self.device) for example in known]
            with no_autocast():
                _Annotator(graph_module, mode).run(*inputs)
        except Exception as error:  # a damaged file; whatever an operator raises for inputs that are none of its own
            for node in graph_module.graph.nodes:
                node.meta.pop("val", None)
            logger.warning("the inputs in the saved graph do not fit it: %s", str(error).splitlines()[0])
            return False
        return True


class _Annotator(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph_module)
        self.mode = mode

    def run_node(self, node: fx.Node) -> Any:
        with enable_python_dispatcher(), self.mode:  # without it some operators refuse symbolic sizes
            result = super().run_node(node)
        node.meta["val"] = result
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
