"""A view of recurrent layers in a graph, each of which is one call for all of its levels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lobcq_fx.graph.attributes import named_arguments

aten = torch.ops.aten

GATES = {aten.lstm.input: 4, aten.gru.input: 3, aten.rnn_tanh.input: 1, aten.rnn_relu.input: 1}
"""How many times the hidden size a weight has rows."""


@dataclass(frozen=True)
class Recurrence:
    """One call.

    gates: rows of a weight over the hidden size.
    states: the hidden states [levels * directions, B, H], and for an LSTM the cells.
    batch: the input's dimension of independent sequences.
    parameters: for each level and direction the weights [gates * H, K] and [gates * H, H], and two biases [gates * H].
    """

    node: fx.Node
    gates: int
    input: fx.Node
    states: tuple[fx.Node, ...]
    parameters: tuple[fx.Node, ...]
    levels: int
    directions: int
    has_biases: bool
    batch: int
    training: bool

    @property
    def wanted_states(self) -> int:
        """An LSTM has cells besides its hidden states."""
        return 2 if self.node.target is aten.lstm.input else 1

    @classmethod
    def of(cls, node: fx.Node) -> Recurrence:
        """The view of a node that calls one of `GATES`."""
        given = named_arguments(node)
        states = given["hx"]
        return cls(
            node,
            GATES[node.target],  # type: ignore[index]
            given["input"],
            tuple(states) if isinstance(states, (list, tuple)) else (states,),
            tuple(given["params"]),
            given["num_layers"],
            1 + given["bidirectional"],
            given["has_biases"],
            0 if given["batch_first"] else 1,
            given["train"],
        )


def recurrences(graph: fx.Graph) -> Iterator[Recurrence]:
    """All of a graph, in its order."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in GATES:
            yield Recurrence.of(node)
