"""Pass: describe the value of every node, as tracing does, in a graph that was loaded from a file.

Files hold what a graph's inputs were in the traced example; the rest follows from running the graph on fake tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lobcq_fx.passes.attributes import fake_mode
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.passes.trace import fixed_size

logger = logging.getLogger(__name__)

EXAMPLE = "lobcq_example"
"""Where the metadata of a loaded placeholder has its `InputExample`."""


LARGEST_SIZE = 1 << 20
"""Of an example's dimensions: those that tracing makes up are tiny."""


@dataclass(frozen=True)
class InputExample:
    """What a placeholder was given when the model was traced.

    dtype: for example "int64". shape: the sizes in the example. dynamic: the dimensions that may have other sizes.
    """

    dtype: str
    shape: tuple[int, ...]
    dynamic: tuple[int, ...]

    @classmethod
    def of(cls, placeholder: fx.Node) -> InputExample | None:
        """From the metadata of a traced or a loaded graph; None where it has neither."""
        value = placeholder.meta.get("val")
        if not isinstance(value, Tensor):
            return placeholder.meta.get(EXAMPLE)
        dynamic = tuple(d for d, size in enumerate(value.shape) if fixed_size(size) is None)
        sizes = tuple(size if isinstance(size, int) else size.node.hint for size in value.shape)
        return cls(str(value.dtype).removeprefix("torch."), sizes, dynamic)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputExample:
        """Inverse of `to_dict`.

        Raises:
            ValueError: no dtype, or sizes and dimensions that are none.
        """
        example = cls(str(values["dtype"]), tuple(values["shape"]), tuple(values["dynamic"]))
        rank = len(example.shape)
        numbers = all(type(n) is int and 0 <= n < LARGEST_SIZE for n in (*example.shape, *example.dynamic))
        if not isinstance(getattr(torch, example.dtype, None), torch.dtype) or not numbers:
            raise ValueError(f"{dict(values)} describes no tensor")
        if any(d >= rank for d in example.dynamic):
            raise ValueError(f"{dict(values)} has no dimension {max(example.dynamic)}")
        return example

    def fake(self, mode: FakeTensorMode, device: torch.device) -> Tensor:
        """A fake tensor with a symbol for each dynamic dimension."""
        with torch.device("meta"):
            example = torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        sizes = [DimDynamic.DYNAMIC if d in self.dynamic else DimDynamic.STATIC for d in range(len(self.shape))]
        described = mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
        with mode:
            return torch.empty_like(described, device=device)


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
        mode = FakeTensorMode(shape_env=ShapeEnv())
        try:
            inputs = [example.fake(mode, self.device) for example in known]
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
