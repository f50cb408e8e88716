"""A linear of a stored graph as settings of a `LobcqLinear`, and where its constants are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lobcq_fx.format import FormatSpec
from lobcq_fx.graph.attributes import get_attribute, named_arguments
from lobcq_fx.graph.stored_linear import StoredLinear
from lobcq_fx.modules.packed_product import LinearSettings

aten = torch.ops.aten

MODES: dict[Any, str] = {
    torch.ops.lobcq.linear.default: "w4a4",
    torch.ops.lobcq.linear.int8_activation: "w4a8",
    torch.ops.lobcq.linear.float_activation: "w4a16",
    torch.ops.lobcq.grouped_linear.default: "w4a4",
    torch.ops.lobcq.grouped_linear.int8_activation: "w4a8",
    torch.ops.lobcq.grouped_linear.float_activation: "w4a16",
}


@dataclass(frozen=True)
class StoredLayer:
    """How a linear of a graph computes, and the names of its constants, as in `CONSTANTS`; None for those it lacks.

    rows: (N,) of its weight, (E, N) of a stack. arrays: of each row. biased: whether it adds a bias.
    """

    settings: LinearSettings
    rows: tuple[int, ...]
    arrays: int
    biased: bool
    constants: Mapping[str, str | None]

    @classmethod
    def of(cls, root: nn.Module, linear: StoredLinear, multiplied: bool) -> StoredLayer:
        """Read a linear of a validated graph.

        Args:
            root: has the tensors.
            linear: one of the graph.
            multiplied: whether its activation is multiplied by columns first.

        Raises:
            ValueError: what a module has no place for.
        """
        weight = get_attribute(root, linear.weight)
        encoder = {} if linear.encoder is None else named_arguments(linear.encoder)
        layer = linear.weight.removesuffix(".weight")
        if linear.bias is not None and str(linear.bias.target) != f"{layer}.bias":
            raise ValueError("its bias is no parameter of its own")
        codebooks = encoder.get("codebooks")
        activations = weight.spec
        if codebooks is not None:
            count = get_attribute(root, str(codebooks.target)).shape[0]
            activations = FormatSpec(count, linear.kernel_array_size)
        source, rotation = read_by(linear)
        if rotation is not None and rotation.args[1] != activations.array_size:
            raise ValueError(f"its activation is rotated in arrays of {rotation.args[1]}, not {activations.array_size}")
        constants = {
            "codebooks": str(linear.codebooks.target),
            "activation_codebooks": None if codebooks is None else str(codebooks.target),
            "activation_scale": None if encoder.get("static_scale") is None else str(encoder["static_scale"].target),
            "input_scale": _input_scale(source) if multiplied else None,
        }
        settings = LinearSettings(
            weight.spec,
            MODES[linear.node.target],
            activations,
            constants["activation_scale"] is not None,
            constants["input_scale"] is not None,
            rotation is not None,
        )
        arrays = weight.spec.num_arrays(weight.columns)
        return cls(settings, (*weight.stack, weight.rows), arrays, linear.bias is not None, constants)


def read_by(linear: StoredLinear) -> tuple[fx.Node | None, fx.Node | None]:
    """What a linear of a graph reads, before it is rotated; and the node that rotates it, None where it is not."""
    x = linear.activation
    if x is None:
        return None, None
    casts = not linear.encodes_activation and x.target is aten.to.dtype  # rotated in fp32, multiplied as it was
    rotation = x.args[0] if casts else x
    if not isinstance(rotation, fx.Node) or rotation.target is not torch.ops.lobcq.rotate.default:
        return x, None
    source = rotation.args[0]
    assert isinstance(source, fx.Node)
    return source, rotation


def _input_scale(scaled: fx.Node | None) -> str:
    """The name of what smoothing multiplies the activation with."""
    scale = scaled.args[1] if scaled is not None and scaled.target is aten.mul.Tensor else None
    if not isinstance(scale, fx.Node) or scale.op != "get_attr":
        raise ValueError("its activation is smoothed in a way that is not known here")
    return str(scale.target)
