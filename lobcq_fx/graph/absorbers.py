"""What can take a division by a scale for each column off an activation: what computes it is divided instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lobcq_fx.graph.norms import LayerNorm, RmsNorm, match_norm

aten = torch.ops.aten


@dataclass(frozen=True)
class Absorber:
    """What to divide, so that an activation [..., K] comes out divided by a scale [K].

    parameters: names of parameters [K].
    linear: the node whose weight's rows are to be divided, too; it is `aten.linear`, its bias among the parameters.
    """

    parameters: tuple[str, ...]
    linear: fx.Node | None = None


def absorber_of(activation: fx.Node) -> Absorber | None:
    """What computes an activation as a product with parameters that nothing else reads; None where nothing does."""
    norm = match_norm(activation)
    if isinstance(norm, LayerNorm) and norm.weight is not None:
        return _of_parameters(activation, norm.weight, norm.bias)
    if isinstance(norm, RmsNorm) and norm.weight is not None and norm.offset == 0:
        return _of_parameters(activation, norm.weight)
    if activation.target is aten.mul.Tensor and not activation.kwargs:
        for factor in reversed(activation.args):  # of gate and up it is up, which comes second
            found = _of_linear(factor)
            if found is not None:
                return found
    if activation.target is aten.relu.default:
        return _of_linear(activation.args[0])
    return None


def _of_linear(node: Any) -> Absorber | None:
    """For the result of a linear that one node alone reads."""
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or len(node.users) > 1:
        return None
    bias = node.args[2] if len(node.args) > 2 else None
    if bias is None:
        return Absorber((), node)
    found = _of_parameters(node, bias)
    return None if found is None else Absorber(found.parameters, node)


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
