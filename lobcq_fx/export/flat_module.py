"""What torch.export is given: a graph that takes its inputs as one list."""

from __future__ import annotations

from torch import Tensor, nn

PREFIX = "traced."
"""What stands before the graph's names in a FlatModule's."""


class FlatModule(nn.Module):
    """Calls a graph with its inputs as one list, which torch.export can describe whatever they are called."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.traced = graph

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """The graph's outputs."""
        outputs: tuple[Tensor, ...] = tuple(self.traced(*tensors))
        return outputs
