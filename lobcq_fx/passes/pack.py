"""Encode a constant weight and put the packed one in its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

import lobcq_fx.ops  # noqa: F401  (registers the op that encodes)
from lobcq_fx.errors import LobcqError
from lobcq_fx.format import Encoded, FormatSpec, sqnr_db
from lobcq_fx.graph.attributes import (
    add_get_attr,
    delete_attribute,
    free_name,
    get_attribute,
    has_attribute,
    register_attribute,
)
from lobcq_fx.graph.matmuls import Matmul
from lobcq_fx.graph.operands import is_transpose
from lobcq_fx.modules.packed_weight import PARTS, PackedWeight


@dataclass(frozen=True)
class Packed:
    """A packed weight in the graph: its `get_attr` nodes in the order the ops take them, its size and its error.

    float_bytes: what the float weight took, 0 where it stays because something else reads it.
    """

    nodes: tuple[fx.Node, ...]
    float_bytes: int
    packed_bytes: int
    sqnr_db: float


def pack_weight(
    graph_module: fx.GraphModule,
    matmuls: list[Matmul],
    codebooks: Tensor,
    codebooks_node: fx.Node,
    release_from: nn.Module | None,
) -> Packed:
    """Encode the weight that `matmuls` share.

    Where nothing else reads the float parameter it is deleted and the packed one takes its name; its memory is freed
    with the parameter of the same name in `release_from`, the float model, or when its last owner lets go. A weight
    that is still needed in float (a tied embedding) stays, and the packed one is named after the first matmul's layer.

    Raises:
        LobcqError: the weight holds NaN or infinity.
    """
    first = matmuls[0]
    assert first.weight is not None
    name = str(first.weight.target)
    weight = get_attribute(graph_module, name).detach()
    weight = weight.t() if first.flipped else weight
    encoded = _encode(weight, name, first.config.format, codebooks)
    sqnr = sqnr_db(weight, encoded)
    float_bytes = weight.numel() * weight.element_size()
    del weight
    if _readers(first.weight) <= {matmul.node for matmul in matmuls}:
        delete_attribute(graph_module, name)
        if release_from is not None:
            owned = get_attribute(release_from, name)
            owned.data = owned.data.new_empty(0)
    else:
        float_bytes = 0
        taken = has_attribute(graph_module, f"{first.layer}.weight")
        name = free_name(graph_module, first.layer, "weight_packed" if taken else "weight")
    register_attribute(graph_module, name, PackedWeight(encoded))
    nodes = tuple(add_get_attr(graph_module, f"{name}.{part}") for part in PARTS)
    return Packed((*nodes, codebooks_node), float_bytes, encoded.nbytes, sqnr)


def _encode(weight: Tensor, name: str, spec: FormatSpec, codebooks: Tensor) -> Encoded:
    try:
        parts = torch.ops.lobcq.quantize_weight(weight, codebooks.to(weight.device), spec.array_size)
    except ValueError as error:
        raise LobcqError(
            f"cannot encode {name}: {error}. Remedy: repair the checkpoint, or exclude the layer"
        ) from None
    codes, selectors, scales, tensor_scale = parts
    return Encoded(codes, selectors, scales, tensor_scale, codebooks, spec, weight.shape[1])


def _readers(weight: fx.Node) -> set[fx.Node]:
    """The nodes that read the weight, looking through its transposes."""
    readers: set[fx.Node] = set()
    for user in weight.users:
        readers |= _readers(user) if is_transpose(user) else {user}
    return readers


def erase_unread(weight: fx.Node) -> None:
    """Erase the float weight's node and its transposes where nothing reads them: the tensor behind them may be gone."""
    for user in list(weight.users):
        if is_transpose(user):
            erase_unread(user)
    if not weight.users:
        weight.graph.erase_node(weight)
