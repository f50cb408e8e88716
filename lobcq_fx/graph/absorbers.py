"""What can take a division by a scale for each column off an activation: what computes it is divided instead."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lobcq_fx.graph.matmuls import Matmul
from lobcq_fx.graph.norms import LayerNorm, RmsNorm, match_norm

aten = torch.ops.aten

_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True)
class Absorber:
    """What to divide, so that an activation [..., K] comes out divided by a scale [K].

    parameters: names of parameters [K].
    linear: the node whose weight's rows are to be divided, too, its bias among the parameters.
    rows: first of these K rows, and the one behind the last.
    """

    parameters: tuple[str, ...]
    linear: fx.Node | None = None
    rows: tuple[int, int] = (0, 0)


Linears = Mapping[fx.Node, Matmul]


def absorber_of(activation: fx.Node, linears: Linears) -> Absorber | None:
    """What computes an activation as a product with parameters that nothing else reads; None where nothing does.

    Args:
        activation: [..., K].
        linears: of its graph, those that have a constant weight, grouped ones too.
    """
    norm = match_norm(activation)
    if isinstance(norm, LayerNorm) and norm.weight is not None:
        return _of_parameters(activation, norm.weight, norm.bias)
    if isinstance(norm, RmsNorm) and norm.weight is not None and norm.offset == 0:
        return _of_parameters(activation, norm.weight)
    if activation.target is aten.mul.Tensor and not activation.kwargs:
        for factor in reversed(activation.args):  # of gate and up it is up, which comes second
            found = _of_linear(factor, linears)
            if found is not None and _columns(factor) == _columns(activation):
                return found
    if activation.target is aten.relu.default:
        return _of_linear(activation.args[0], linears)
    return None


def _columns(node: Any) -> Any:
    """K of [..., K]."""
    return node.meta["val"].shape[-1]


def _of_linear(node: Any, linears: Linears) -> Absorber | None:
    """For the result of a linear, or one of the parts that it is split in, that one node alone reads."""
    if not isinstance(node, fx.Node) or len(node.users) > 1:
        return None
    if node.target is operator.getitem:
        split, index = node.args
        return _of_part(split, index, linears)
    if node not in linears:
        return None
    rows, bias = (0, node.meta["val"].shape[-1]), linears[node].bias
    if bias is None:
        return Absorber((), node, rows)
    found = _of_parameters(node, bias)
    return None if found is None else Absorber(found.parameters, node, rows)


def _of_part(split: Any, index: Any, linears: Linears) -> Absorber | None:
    """For one of the parts that the columns of a linear's result are split in."""
    if split.target not in _SPLITS:
        return None
    parts, linear = split.meta["val"], split.args[0]
    found = _of_linear(linear, linears)
    by_columns = sum(part.shape[-1] for part in parts) == linear.meta["val"].shape[-1]
    if found is None or found.parameters or not by_columns:
        return None
    first = sum(part.shape[-1] for part in parts[:index])
    return Absorber((), linear, (first, first + parts[index].shape[-1]))


def _of_parameters(reader: fx.Node, *parameters: Any) -> Absorber | None:
    """Parameters [K] that are read where the activation is computed, and nowhere else."""
    given = [one for one in parameters if one is not None]
    columns = reader.meta["val"].shape[-1]
    for one in given:
        if not isinstance(one, fx.Node) or one.op != "get_attr" or one.meta["val"].shape != (columns,):
            return None
        readers = [node for same in reader.graph.find_nodes(op="get_attr", target=one.target) for node in same.users]
        if len(readers) != 1:
            return None
    return Absorber(tuple(str(one.target) for one in given))
