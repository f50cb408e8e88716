"""Convolutions of constant weights: which of them are matmuls, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lobcq_fx.graph.attributes import named_arguments
from lobcq_fx.graph.contraction import Contraction, rank
from lobcq_fx.modules.windows import Call, Windows, windows_of

aten = torch.ops.aten

CONVOLUTIONS = {
    overload for packet in (aten.conv1d, aten.conv2d, aten.conv3d) for overload in (packet.default, packet.padding)
}


@dataclass(frozen=True)
class Convolution(Contraction):
    """A convolution whose windows share nothing; its weight is [N, C, *sizes]."""

    windows: Windows

    def activation(self, call: Call) -> fx.Node:
        """A row for each window."""
        rows: fx.Node = self.windows.rows(call, self.x, rank(self.x))
        return rows

    def result(self, call: Call, rows: fx.Node) -> fx.Node:
        """The image, with its channels beside each other in memory."""
        image: fx.Node = self.windows.image(call, rows, rank(self.x))
        return image


def windows(node: fx.Node) -> Windows | str:
    """The windows of a node of `CONVOLUTIONS`, or why it is no matmul."""
    given = named_arguments(node)
    sizes = given["weight"].meta["val"].shape[2:]
    return windows_of(
        sizes, given.get("stride", [1]), given.get("padding", [0]), given.get("dilation", [1]), given.get("groups", 1)
    )


def convolution(node: fx.Node) -> Convolution | None:
    """A node as a matmul, if it is one whose weight is a constant."""
    if node.op != "call_function" or node.target not in CONVOLUTIONS:
        return None
    given, found = named_arguments(node), windows(node)
    weight = given["weight"]
    if isinstance(found, str) or weight.op != "get_attr":
        return None
    columns = tuple(range(1, rank(weight)))
    return Convolution(node, given["input"], weight, (0,), columns, given.get("bias"), found)
