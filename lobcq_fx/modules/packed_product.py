"""What modules that multiply by a packed weight have in common: their settings, constants and kernel layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import OperandError
from lobcq_fx.format import FormatSpec
from lobcq_fx.modules.packed_weight import PackedWeight, WeightLayout
from lobcq_fx.modules.weight_part import WholeRows, with_zero_array

ops = torch.ops.lobcq

LayoutOf = Callable[[torch.device], WeightLayout | None]
"""The weight layout of a device's kernels; None where the ops read weights as they are stored."""

CONSTANTS = ("codebooks", "activation_codebooks", "activation_scale", "input_scale")
"""Buffers of a `PackedProduct` besides its weight; None where the settings have no use for one."""


@dataclass(frozen=True)
class LinearSettings:
    """How one layer computes.

    spec: format of the weight. mode: as in `LobcqConfig`. activations: format of the activation, in "w4a4".
    static_scale: the activation has a calibrated tensor scale. input_scale: it is multiplied by columns first.
    rotated: its block arrays are rotated then, as the weight's are.
    """

    spec: FormatSpec
    mode: str
    activations: FormatSpec
    static_scale: bool = False
    input_scale: bool = False
    rotated: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinearSettings:
        """Inverse of `to_dict`.

        Raises:
            ConfigError, KeyError: no settings of a layer.
        """
        config = LobcqConfig(
            values["format"], values["mode"], values["activation_format"]
        )  # checks each, and that they fit
        static, scaled = bool(values["static_scale"]), bool(values["input_scale"])
        rotated = bool(values.get("rotated"))  # folders of earlier releases do not say
        return cls(config.format, config.mode, config.activations, static, scaled, rotated)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "format": self.spec.name,
            "mode": self.mode,
            "activation_format": None if self.activations == self.spec else self.activations.name,
            "static_scale": self.static_scale,
            "input_scale": self.input_scale,
            "rotated": self.rotated,
        }


class PackedProduct(nn.Module):
    """A module that multiplies activations by a packed weight, which gets no gradient; activations do.

    codebooks: the weight's, int8 [N_c, 16]. activation_codebooks: int8 [N_c, 16]. activation_scale: calibrated, fp32
    []. input_scale: [K].

    Once `prepack` was called, the weight lies as the kernels of its device want it, wherever the module is moved.

    in_features: K. out_features: N. Where several processes have a part of the weight each (`hold_part`), they are of
    the whole, and own_columns are those of K that this process reads.
    """

    settings: LinearSettings
    layout_of: LayoutOf
    in_features: int
    out_features: int
    own_columns: range
    whole_rows: WholeRows | None
    codebooks: Tensor
    activation_codebooks: Tensor | None
    activation_scale: Tensor | None
    input_scale: Tensor | None
    codebook_tables: Tensor
    activation_tables: Tensor | None

    @property
    def packed(self) -> PackedWeight:
        """The weight."""
        raise NotImplementedError

    def _add_constants(self, dtype: torch.dtype, device: torch.device) -> None:
        """Constants of no content, for tensors to be put in; dtype: of the input scale."""

        def buffer(name: str, size: tuple[int, ...], kind: torch.dtype, wanted: bool = True) -> None:
            self.register_buffer(name, torch.empty(size, dtype=kind, device=device) if wanted else None)

        settings = self.settings
        buffer("codebooks", (settings.spec.num_codebooks, 16), torch.int8)
        buffer("activation_codebooks", (settings.activations.num_codebooks, 16), torch.int8, settings.mode == "w4a4")
        buffer("activation_scale", (), torch.float32, settings.static_scale)
        buffer("input_scale", (self.in_features,), dtype, settings.input_scale)
        self.own_columns, self.whole_rows = range(self.in_features), None

    @property
    def local_in_features(self) -> int:
        """How many columns of an activation this process multiplies."""
        return len(self.own_columns)

    def hold_part(self, parts: Mapping[str, Tensor], group: torch.distributed.ProcessGroup) -> None:
        """Have a part of the weight from now on: some rows, some matrices of a stack, or its `own_columns`.

        Args:
            parts: of it, as they are stored.
            group: the processes that have the others.
        """
        spec, count = self.settings.spec, self.local_in_features
        encodes = self.settings.mode != "w4a16" and not self.settings.static_scale
        if encodes and count != self.in_features:
            self.whole_rows = WholeRows(group, spec.array_size)
            parts, count = with_zero_array(parts, spec, count), count + spec.array_size
        self.packed.hold(parts, count)

    def _to_encode(self, x: Tensor) -> tuple[Tensor, bool]:
        """What is encoded of an activation, and whether it is to be rotated first."""
        if self.whole_rows is None:
            return x, self.settings.rotated
        if self.settings.rotated:
            x = ops.rotate(x, self.settings.activations.array_size)
        return self.whole_rows.largest_beside(x), False

    def prepack(self) -> None:
        """Hold the weight in the layout of its device's kernels, if that has one."""
        layout = self.layout_of(self.codebooks.device)
        if layout is not None:
            self.packed.repack(layout, self.settings.activations.array_size)
            self._look_up(layout)

    def unpack(self) -> None:
        """Hold the weight as it is stored again; the inverse of `prepack`."""
        if self.packed.layout is not None:
            self.packed.restore()
            del self.codebook_tables, self.activation_tables

    def _check(self, x: Tensor) -> None:
        """That x is an activation of K columns.

        Raises:
            OperandError: it is none.
        """
        if x.shape[-1] != self.local_in_features:  # kernels know K but for padding
            raise OperandError(f"x is {list(x.shape)}: the layer takes [..., {self.local_in_features}]")

    def _look_up(self, layout: WeightLayout) -> None:
        """Make the kernels' look-up tables of the codebooks."""
        self.register_buffer("codebook_tables", layout.tables(self.codebooks), persistent=False)
        codebooks = self.activation_codebooks
        tables = None if codebooks is None else layout.tables(codebooks)
        self.register_buffer("activation_tables", tables, persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.packed.layout is not None:
            self._look_up(self.packed.layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.codebooks.device
        leaves = fn(torch.empty(0, dtype=torch.uint8, device=before)).device != before
        if leaves:
            self.unpack()  # the layout belongs to the device that is left
        scale, self.activation_scale = self.activation_scale, None
        super()._apply(fn, recurse)
        if scale is not None:  # fp32 whatever the model is cast to: fn sees bytes
            self.activation_scale = fn(scale.reshape(1).view(torch.uint8)).view(torch.float32).reshape(())
        if leaves and before.type != "meta":
            self.prepack()
        return self

    def extra_repr(self) -> str:
        """Sizes, format and mode."""
        stack = "".join(f"num_experts={count}, " for count in self.packed.stack)
        bias = "" if stack else f", bias={getattr(self, 'bias', None) is not None}"
        sizes = f"{stack}in_features={self.in_features}, out_features={self.out_features}{bias}"
        rotated = ", rotated" if self.settings.rotated else ""
        return f"{sizes}, {self.settings.spec.name}, {self.settings.mode}{rotated}"
