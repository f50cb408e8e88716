"""What a product with a constant has to say of itself to be written as a `linear`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import fx

from lobcq_fx.modules.windows import Call

MATRIX = "_matrix"
"""What the name of a constant ends with that stands as a matrix beside one of another rank."""


@dataclass(frozen=True)
class Contraction(ABC):
    """A matmul of an activation and a constant of any rank, whose dimensions are those of N, of K, or of size 1.

    node: what computes it. x: the activation. weight: the `get_attr` node of the constant.
    rows, columns: dimensions of the constant that N, and K, are made of, in this order.
    bias: added to each row [N] of the result; None without one.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    bias: fx.Node | None

    @abstractmethod
    def activation(self, call: Call) -> fx.Node:
        """The activation as rows, [..., K]."""

    @abstractmethod
    def result(self, call: Call, rows: fx.Node) -> fx.Node:
        """What the node gives, of the product's rows [..., N]."""


def rank(node: fx.Node) -> int:
    """The number of a tensor's dimensions."""
    dims: int = node.meta["val"].dim()
    return dims
