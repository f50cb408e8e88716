"""A linear on a packed weight, for models that stay modules: it calls the ops that the passes write into graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lobcq_fx.ops  # noqa: F401  (registers the ops)
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import LobcqError, OperandError
from lobcq_fx.format import FormatSpec
from lobcq_fx.modules.packed_weight import PARTS, PackedWeight, WeightLayout
from lobcq_fx.ops.schemas import NO_GRADIENT

ops = torch.ops.lobcq

CONSTANTS = ("codebooks", "activation_codebooks", "activation_scale", "input_scale")
"""Buffers of a `LobcqLinear` besides its weight; None where the settings have no use for one."""


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


class LobcqLinear(nn.Module):
    """`x @ w.T + bias` of an activation [..., K] in fp32, bf16 or fp16; the result [..., N] is as x. Inference only.

    weight: the packed weight [N, K], a module. bias: [N], or None. codebooks: the weight's, int8 [N_c, 16].
    activation_codebooks: int8 [N_c, 16]. activation_scale: calibrated, fp32 []. input_scale: [K].

    Once `prepack` was called, the weight lies as the kernels of its device want it, wherever the module is moved.
    """

    codebooks: Tensor
    activation_codebooks: Tensor | None
    activation_scale: Tensor | None
    input_scale: Tensor | None
    codebook_tables: Tensor
    activation_tables: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        settings: LinearSettings,
        layout_of: Callable[[torch.device], WeightLayout | None],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """A layer without content, for tensors to be put in.

        Args:
            shape: (N, K).
            bias: [N].
            settings: how it computes.
            layout_of: the weight layout of a device's kernels; None where the ops read weights as they are stored.
            dtype: of the input scale.
            device: of all tensors.
        """
        super().__init__()
        self.settings, self.layout_of = settings, layout_of
        self.out_features, self.in_features = shape
        self.weight = PackedWeight.empty(shape, settings.spec, device)
        self.bias = bias

        def buffer(name: str, size: tuple[int, ...], kind: torch.dtype, wanted: bool = True) -> None:
            self.register_buffer(name, torch.empty(size, dtype=kind, device=device) if wanted else None)

        encodes = settings.mode == "w4a4"
        buffer("codebooks", (settings.spec.num_codebooks, 16), torch.int8)
        buffer("activation_codebooks", (settings.activations.num_codebooks, 16), torch.int8, encodes)
        buffer("activation_scale", (), torch.float32, settings.static_scale)
        buffer("input_scale", (self.in_features,), dtype, settings.input_scale)

    def prepack(self) -> None:
        """Hold the weight in the layout of its device's kernels, if that has one."""
        layout = self.layout_of(self.codebooks.device)
        if layout is not None:
            self.weight.repack(layout, self.settings.activations.array_size)
            self._look_up(layout)

    def forward(self, x: Tensor) -> Tensor:
        """The product, with the activation encoded as the settings say.

        Raises:
            LobcqError: x requires a gradient. OperandError: it is no float activation of K columns.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise LobcqError(NO_GRADIENT)
        if x.shape[-1] != self.in_features:  # kernels know K but for padding
            raise OperandError(f"x is {list(x.shape)}: the layer takes [..., {self.in_features}]")
        if self.input_scale is not None:
            x = x * self.input_scale
        return self._stored(x) if self.weight.layout is None else self._prepacked(x)

    def _stored(self, x: Tensor) -> Tensor:
        weight = (*(getattr(self.weight, part) for part in PARTS), self.codebooks)
        mode, size, arrays = self.settings.mode, self.settings.spec.array_size, self.settings.activations.array_size
        read = ops.rotate(x, arrays) if self.settings.rotated else x
        out: Tensor
        if mode == "w4a16":
            out = ops.linear.float_activation(read.to(x.dtype), *weight, self.bias, size)
        elif mode == "w4a8":
            encoded = ops.quantize_activation_int8(read, size, self.activation_scale)
            out = ops.linear.int8_activation(*encoded, *weight, self.bias, self.in_features, size, x.dtype)
        else:
            encoded = ops.quantize_activation(read, self.activation_codebooks, arrays, self.activation_scale)
            tail = (self.bias, self.in_features, size, x.dtype, arrays)
            out = ops.linear(*encoded, self.activation_codebooks, *weight, *tail)
        return out

    def _prepacked(self, x: Tensor) -> Tensor:
        rotated, arrays = self.settings.rotated, self.settings.activations.array_size
        absent = torch.empty(0, dtype=torch.float32, device=x.device)
        weight = (
            [self.weight.prepacked],
            [self.weight.tensor_scale],
            self.codebook_tables,
            [absent if self.bias is None else self.bias],
            [self.out_features],
            arrays,
        )
        out: list[Tensor]
        if self.settings.mode == "w4a16":
            read = ops.rotate(x, arrays).to(x.dtype) if rotated else x
            out = ops.linear_prepacked.float_activation(read, *weight)
        else:
            out = ops.linear_prepacked(x, self.activation_tables, self.activation_scale, *weight, x.dtype, rotated)
        return out[0]

    def _look_up(self, layout: WeightLayout) -> None:
        """Make the kernels' look-up tables of the codebooks."""
        self.register_buffer("codebook_tables", layout.tables(self.codebooks), persistent=False)
        codebooks = self.activation_codebooks
        tables = None if codebooks is None else layout.tables(codebooks)
        self.register_buffer("activation_tables", tables, persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.weight.layout is not None:
            self._look_up(self.weight.layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LobcqLinear:
        before = self.codebooks.device
        leaves = fn(torch.empty(0, dtype=torch.uint8, device=before)).device != before
        if leaves and self.weight.layout is not None:  # which belongs to the device that is left
            self.weight.restore()
            del self.codebook_tables, self.activation_tables
        scale, self.activation_scale = self.activation_scale, None
        super()._apply(fn, recurse)
        if scale is not None:  # fp32 whatever the model is cast to: fn sees bytes
            self.activation_scale = fn(scale.reshape(1).view(torch.uint8)).view(torch.float32).reshape(())
        if leaves and before.type != "meta":
            self.prepack()
        return self

    def extra_repr(self) -> str:
        """Sizes, format and mode."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        rotated = ", rotated" if self.settings.rotated else ""
        return f"{sizes}, {self.settings.spec.name}, {self.settings.mode}{rotated}"
