"""Pass: a graph for growing or for static caches keeps keys and values encoded from call to call.

grown = cat(past, new, -2)  ->  rows = cat(past_rows, quantize_states(new), 1); grown = dequantize_states(rows)
whole = index_copy_(state, 2, positions, new)
    ->  rows = index_copy_(rows, 1, positions, quantize_states(new)); whole = dequantize_states(rows)

Rows are uint8 [B, P, row_bytes], and what a graph for growing caches returns in the place of `grown`. Attention reads
what the rows decode to for the call's own tokens too, so that a prompt gives the same whether it comes in one call or
in several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, fx

from lobcq_fx.cache_format import CacheFormat
from lobcq_fx.format import universal_codebooks
from lobcq_fx.format.rotation import RotatedOperand
from lobcq_fx.graph.attributes import add_call
from lobcq_fx.graph.fake_tensors import fake_mode
from lobcq_fx.passes.infra import GraphPass
from lobcq_fx.refusal import Refusal
from lobcq_fx.tracing.example import EXAMPLE

aten = torch.ops.aten
lobcq = torch.ops.lobcq

CONSTANT = "lobcq_cache_"
"""What the names of the inputs that hold codebooks and rotations start with."""

APPENDING = "the graph does not {} the call's own keys or values to the cached ones, once, by a {}"

LENGTH = 2
"""Dimension of the tokens in keys and values [B, H, P, D]."""

ROW_LENGTH = 1
"""Dimension of the tokens in rows [B, P, row_bytes]."""


@dataclass(frozen=True)
class QuantizeCache(GraphPass):
    """Encode the cache of a graph whose last inputs are the keys and values of every layer in turn.

    In a graph for static caches the positions come behind them. Then follow new inputs: what `constants` gives. It
    changes all layers or none.

    cache: how they are stored. heads: of each layer, heads and the widths of a key and a value. dtype: of both.
    static: whether the graph is one for static caches.
    """

    name: ClassVar[str] = "quantize_cache"

    cache: CacheFormat
    heads: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype
    static: bool = False

    def attempt(self, graph_module: fx.GraphModule) -> tuple[bool, list[Refusal]]:
        """Rewrite every state; refuse a graph in which one is not only grown by a `cat`, or written to in place."""
        graph = graph_module.graph
        placeholders = graph.find_nodes(op="placeholder")
        if any(node.target in self.constants for node in placeholders):
            return False, []
        first = len(placeholders) - 2 * len(self.heads) - self.static
        states = placeholders[first : first + 2 * len(self.heads)]
        refusals = [Refusal(self.name, node.name, reason) for node in states if (reason := self._refusal(node))]
        if refusals:
            return False, refusals
        constants = _add_inputs(graph, placeholders[-1], self.constants)
        for place, state in enumerate(states):
            layer, is_value = divmod(place, 2)
            heads, *widths = self.heads[layer]
            self._rewrite(graph, state, (heads, widths[is_value]), constants, self.cache.rotate_keys and not is_value)
        return True, []

    @property
    def constants(self) -> dict[str, Tensor]:
        """Inputs behind the states, by name, on the CPU: codebooks, and for each width of rotated keys both matrices.

        The graph's attributes are those of the model, which is saved: they have no place there.
        """
        found = {"codebooks": universal_codebooks(self.cache.spec.num_codebooks)}
        for width in dict.fromkeys(key for _, key, _ in self.heads) if self.cache.rotate_keys else ():
            for operand in get_args(RotatedOperand):
                found[_matrix(width, operand)] = self.cache.rotation(width, operand).to(self.dtype)
        return {CONSTANT + name: tensor for name, tensor in found.items()}

    def _rewrite(
        self, graph: fx.Graph, state: fx.Node, shape: tuple[int, int], constants: dict[str, fx.Node], rotated: bool
    ) -> None:
        (grown,) = (node for node in state.users if node.target is self._write)
        new: Any = grown.args[3] if self.static else grown.args[0][1]  # type: ignore[index]
        codebooks = constants[CONSTANT + "codebooks"]
        heads, width = shape
        layout = self.cache.rows(heads, width)

        def rotate(x: fx.Node, operand: RotatedOperand) -> fx.Node:
            matrix = constants[CONSTANT + _matrix(width, operand)] if rotated else None
            return x if matrix is None else add_call(graph, aten.matmul.default, (x, matrix), like=grown)

        _hold_rows(state, layout.row_bytes)
        array_size = layout.spec.array_size
        with graph.inserting_before(grown):
            states = (rotate(new, "weight"), codebooks, array_size)
            encoded = add_call(graph, lobcq.quantize_states.default, states, like=grown)
            if self.static:
                written = (state, ROW_LENGTH, grown.args[2], encoded)
                rows = add_call(graph, aten.index_copy_.default, written, like=grown)
            else:
                rows = add_call(graph, aten.cat.default, ([state, encoded], ROW_LENGTH), like=grown)
            arguments = (rows, codebooks, heads, width, array_size, self.dtype)
            read = rotate(add_call(graph, lobcq.dequantize_states.default, arguments, like=grown), "activation")
        graph.output_node().replace_input_with(grown, rows)
        grown.replace_all_uses_with(read)
        graph.erase_node(grown)

    @property
    def _write(self) -> Any:
        """What puts the call's own keys and values behind the cached ones."""
        return aten.index_copy_.default if self.static else aten.cat.default

    def _refusal(self, state: fx.Node) -> str | None:
        """Why keys or values that come in as `state` cannot be kept as rows; None where they can."""
        written = [node for node in state.users if node.target is self._write]
        others = [node for node in state.users if node.target is not self._write]
        if len(written) != 1 or not (_overwrites if self.static else _appends)(written[0], state):
            return APPENDING.format(*("write", "index_copy_") if self.static else ("append", "cat"))
        if any(node.target is not aten.sym_size.int or node.args[1] not in (0, LENGTH) for node in others):
            return f"the graph reads the cached keys or values elsewhere too: {others[0].format_node()}"
        return None


def _matrix(width: int, operand: RotatedOperand) -> str:
    return f"rotation_{width}_{operand}"


def _appends(cat: fx.Node, state: fx.Node) -> bool:
    tensors, *dimension = cat.args
    returned = any(node.op == "output" for node in cat.users)
    return returned and len(tensors) == 2 and tensors[0] is state and dimension in ([-2], [LENGTH])  # type: ignore[arg-type, index]


def _overwrites(index_copy: fx.Node, state: fx.Node) -> bool:
    return index_copy.args[0] is state and index_copy.args[1] in (LENGTH, -2)


def _hold_rows(state: fx.Node, row_bytes: int) -> None:
    """Let an input [B, H, P, D] be rows [B, P, row_bytes]; those who ask for its length ask for the new dimension."""
    state.meta.pop(EXAMPLE, None)
    before = state.meta.get("val")
    if before is not None:
        with before.fake_mode:
            shape = (before.shape[0], before.shape[LENGTH], row_bytes)
            state.meta["val"] = before.new_empty(shape, dtype=torch.uint8)
    for node in list(state.users):
        if node.target is aten.sym_size.int and node.args[1] == LENGTH:
            node.args = (state, ROW_LENGTH)


def _add_inputs(graph: fx.Graph, last: fx.Node, constants: dict[str, Tensor]) -> dict[str, fx.Node]:
    """New inputs behind the last one."""
    mode, added = fake_mode(graph), {}
    for name, tensor in constants.items():
        with graph.inserting_after(last):
            added[name] = last = graph.placeholder(name)
        if mode is not None:
            last.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    return added
