"""Norms as traced graphs spell them out: found by their operators, told apart by where they round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lobcq_fx.graph.attributes import named_arguments
from lobcq_fx.graph.prepacked_calls import NO_METADATA, value_of

aten = torch.ops.aten

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SEVERAL_DIMENSIONS = "it does not norm over the last dimension alone"


@dataclass(frozen=True)
class RmsNorm:
    """`lobcq_fx.ops.prologues.rms_norm` of `x`. nodes: what computes it."""

    x: fx.Node
    weight: fx.Node | None
    eps: float
    offset: float
    round_first: bool
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class LayerNorm:
    """`lobcq_fx.ops.prologues.layer_norm` of `x`. nodes: what computes it."""

    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    nodes: tuple[fx.Node, ...]


def match_norm(node: fx.Node) -> RmsNorm | LayerNorm | str | None:
    """The norm that `node` is the result of; a text where it is one that no encoder fuses; None if it is no norm."""
    found: RmsNorm | LayerNorm | str | None
    if node.target is aten.layer_norm.default:
        found = _layer_norm(node, **named_arguments(node))
    elif node.target is aten.rms_norm.default:
        found = _rms_norm_operator(node, **named_arguments(node))
    else:
        found = _rms_norm(node)
    if isinstance(found, (str, type(None))):
        return found
    x, y = value_of(found.x), value_of(node)
    if x is None or y is None:
        return NO_METADATA
    if x.dtype not in FLOATS or y.dtype != x.dtype:
        return f"it makes {y.dtype} of {x.dtype}"
    return found


def _layer_norm(
    node: fx.Node,
    input: fx.Node,
    normalized_shape: list[int],
    weight: fx.Node | None = None,
    bias: fx.Node | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> LayerNorm | str:
    if len(normalized_shape) != 1:
        return SEVERAL_DIMENSIONS
    return LayerNorm(input, weight, bias, eps, (node,))


def _rms_norm_operator(
    node: fx.Node,
    input: fx.Node,
    normalized_shape: list[int],
    weight: fx.Node | None = None,
    eps: float | None = None,
) -> RmsNorm | str:
    if len(normalized_shape) != 1:
        return SEVERAL_DIMENSIONS
    if eps is None:
        return "its eps depends on the dtype"
    return RmsNorm(input, weight, eps, 0.0, False, (node,))


def _rms_norm(y: fx.Node) -> RmsNorm | str | None:
    """`cast(weight * cast(x * rsqrt(mean(x**2) + eps)))`, the casts and the weight where there are any."""
    product, casts = _uncast(y)
    core = _normalized(product)
    if core is not None:
        return core if isinstance(core, str) else _with_weight(core, None, (*casts, *core.nodes))
    if product.target is not aten.mul.Tensor:
        return None
    for weight, normalized in (product.args, product.args[::-1]):
        core = _normalized(normalized)
        if isinstance(core, str):
            return core
        if core is not None:
            return _with_weight(core, weight, (*casts, product, *core.nodes))
    return None


@dataclass(frozen=True)
class _Normalized:
    """`x * rsqrt(mean(x**2) + eps)`, rounded to x's dtype or not."""

    x: fx.Node
    eps: float
    rounded: bool
    nodes: tuple[fx.Node, ...]


def _normalized(node: Any) -> _Normalized | str | None:
    if not isinstance(node, fx.Node):
        return None
    product, casts = _uncast(node)
    if product.target is not aten.mul.Tensor:
        return None
    for wide, factor in (product.args, product.args[::-1]):
        if isinstance(factor, fx.Node) and factor.target is aten.rsqrt.default and isinstance(wide, fx.Node):
            inverse = _inverse(factor, wide)
            if inverse is None or isinstance(inverse, str):
                return inverse
            eps, nodes = inverse
            x, widening = _uncast(wide)
            read, made = value_of(x), value_of(node)
            if read is None or made is None:
                return NO_METADATA
            if made.dtype not in (read.dtype, torch.float32):
                return f"it rounds {read.dtype} to {made.dtype}"
            return _Normalized(x, eps, made.dtype == read.dtype, (*casts, product, *nodes, *widening))
    return None


def _inverse(rsqrt: fx.Node, wide: fx.Node) -> tuple[float, tuple[fx.Node, ...]] | str | None:
    """eps and the nodes of `rsqrt(mean(wide**2) + eps)`."""
    found = root_mean_square(rsqrt, wide)
    if found is None:
        return None
    total, mean, square = found
    eps = total.args[1]
    value = value_of(wide)
    if value is None:
        return NO_METADATA
    dimensions, *keepdim = mean.args[1:]
    if [d % value.dim() for d in dimensions] != [value.dim() - 1] or keepdim != [True]:  # type: ignore[union-attr, operator]
        return SEVERAL_DIMENSIONS
    if not isinstance(eps, (int, float)) or total.kwargs:
        return "its eps is computed"
    if value.dtype != torch.float32 or mean.kwargs:
        return "its mean is not in fp32"
    return float(eps), (rsqrt, total, mean, square)


def root_mean_square(rsqrt: fx.Node, wide: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The sum, the mean and the square where a node is `rsqrt(mean(wide**2, ...) + ...)`, of whatever dimensions."""
    if rsqrt.target is not aten.rsqrt.default:
        return None
    total = rsqrt.args[0]
    if not isinstance(total, fx.Node) or total.target is not aten.add.Tensor:
        return None
    mean = total.args[0]
    if not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim:
        return None
    square = mean.args[0]
    assert isinstance(square, fx.Node)
    squares = {
        aten.pow.Tensor_Scalar: square.args == (wide, 2),
        aten.mul.Tensor: square.args == (wide, wide),
        aten.square.default: square.args == (wide,),
    }
    return (total, mean, square) if squares.get(square.target, False) else None  # type: ignore[call-overload]


def _with_weight(core: _Normalized, weight: Any, nodes: tuple[fx.Node, ...]) -> RmsNorm | str:
    offset = 0.0
    if weight is not None:
        value, x = value_of(weight), value_of(core.x)
        if value is None or x is None or value.shape != x.shape[-1:] or value.dtype not in FLOATS:
            return "its weight is not one float for each column"
        weight, offset = _without_offset(weight)
    return RmsNorm(core.x, weight, core.eps, offset, core.rounded, nodes)


def _without_offset(weight: fx.Node) -> tuple[fx.Node, float]:
    """`fp32(w) + 1` as (w, 1.0), the sum taken in fp32 as the rule takes it; another weight as (weight, 0.0)."""
    value = value_of(weight)
    if weight.target is aten.add.Tensor and value is not None and value.dtype == torch.float32 and not weight.kwargs:
        inner, offset = weight.args
        if isinstance(inner, fx.Node) and isinstance(offset, (int, float)):
            return _uncast(inner)[0], float(offset)
    return weight, 0.0


def _uncast(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """What `node` casts, and the casts: one that changes the dtype, and those around it that do not."""
    casts: tuple[fx.Node, ...] = ()
    changed = False
    while _is_cast(node):
        source = node.args[0]
        value, before = value_of(node), value_of(source)
        changes = value is None or before is None or value.dtype != before.dtype
        if changes and changed:
            break
        changed, casts, node = changed or changes, (*casts, node), source  # type: ignore[assignment]
    return node, casts


def _is_cast(node: fx.Node) -> bool:
    if node.target is aten.to.dtype:
        return len(node.args) == 2 and not node.kwargs
    if node.target is aten._to_copy.default:
        return set(node.kwargs) == {"dtype"}
    return node.target is aten.type_as.default
