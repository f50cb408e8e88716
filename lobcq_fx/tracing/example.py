"""What a traced graph's inputs were in the example, as saved graphs keep it: the values of all nodes follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from lobcq_fx.tracing.sizes import fixed_size

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
        example = torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="meta")
        sizes = [DimDynamic.DYNAMIC if d in self.dynamic else DimDynamic.STATIC for d in range(len(self.shape))]
        described = mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
        with mode:
            return torch.empty_like(described, device=device)


def from_a_file(graph: fx.Graph) -> bool:
    """Whether a graph may have been written by somebody: all but those whose every input was traced here."""
    inputs = graph.find_nodes(op="placeholder")
    return not inputs or any(EXAMPLE in node.meta or "val" not in node.meta for node in inputs)
