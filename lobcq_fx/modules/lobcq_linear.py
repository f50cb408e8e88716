"""A linear on a packed weight, for models that stay modules: it calls the ops that the passes write into graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lobcq_fx.ops  # noqa: F401  (registers the ops)
from lobcq_fx.errors import LobcqError
from lobcq_fx.modules.packed_product import LayoutOf, LinearSettings, PackedProduct
from lobcq_fx.modules.packed_weight import PARTS, PackedWeight
from lobcq_fx.modules.straight_through import through

ops = torch.ops.lobcq


class LobcqLinear(PackedProduct):
    """`x @ w.T + bias` of an activation [..., K] in fp32, bf16 or fp16; the result [..., N] is as x.

    Where it has a part of the columns (`hold_part`), the result is a part of the sum, in fp32.

    weight: the packed weight [N, K], a module. bias: [N], or None.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        settings: LinearSettings,
        layout_of: LayoutOf,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """A layer without content, for tensors to be put in.

        Args:
            shape: (N, K).
            bias: [N].
            settings: how it computes.
            layout_of: of a device, how its kernels want weights.
            dtype: of the input scale.
            device: of all tensors.
        """
        super().__init__()
        self.settings, self.layout_of = settings, layout_of
        self.out_features, self.in_features = shape
        self.weight = PackedWeight.empty(shape, settings.spec, device)
        self.bias = bias
        self._add_constants(dtype, device)

    @property
    def packed(self) -> PackedWeight:
        """The weight."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """The product, with the activation encoded as the settings say. x gets the gradient of a straight-through one.

        Raises:
            OperandError: x is no float activation of K columns. LobcqError: the bias is to be trained.
        """
        self._check(x)
        if torch.is_grad_enabled() and self.bias is not None and self.bias.requires_grad:
            raise LobcqError("the bias of a packed linear is not trained: bias.requires_grad_(False)")
        return through(x, self._product, self._to_input)

    def _product(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            x = x * self.input_scale
        return self._stored(x) if self.weight.layout is None else self._prepacked(x)

    def _result_dtype(self, x: Tensor) -> torch.dtype:
        """What is to be added to others' parts is rounded when it is whole."""
        return x.dtype if self.local_in_features == self.in_features else torch.float32

    def _to_input(self, gradient: Tensor) -> Tensor:
        (weight,) = self.weight.matrices(self.codebooks)
        out = gradient.float() @ weight[:, : self.local_in_features]
        if self.settings.rotated:  # the rotation is its own inverse
            out = ops.rotate(out, self.settings.activations.array_size)
        return out if self.input_scale is None else out * self.input_scale

    def _stored(self, x: Tensor) -> Tensor:
        weight = (*(getattr(self.weight, part) for part in PARTS), self.codebooks)
        mode, size, arrays = self.settings.mode, self.settings.spec.array_size, self.settings.activations.array_size
        read, rotated = self._to_encode(x)
        read, dtype = ops.rotate(read, arrays) if rotated else read, self._result_dtype(x)
        out: Tensor
        if mode == "w4a16":
            out = ops.linear.float_activation(read.to(x.dtype).to(dtype), *weight, self.bias, size)
        elif mode == "w4a8":
            encoded = ops.quantize_activation_int8(read, size, self.activation_scale)
            out = ops.linear.int8_activation(*encoded, *weight, self.bias, self.weight.columns, size, dtype)
        else:
            encoded = ops.quantize_activation(read, self.activation_codebooks, arrays, self.activation_scale)
            tail = (self.bias, self.weight.columns, size, dtype, arrays)
            out = ops.linear(*encoded, self.activation_codebooks, *weight, *tail)
        return out

    def _prepacked(self, x: Tensor) -> Tensor:
        arrays = self.settings.activations.array_size
        (read, rotated), dtype = self._to_encode(x), self._result_dtype(x)
        absent = torch.empty(0, dtype=torch.float32, device=x.device)
        weight = (
            [self.weight.prepacked],
            [self.weight.tensor_scale],
            self.codebook_tables,
            [absent if self.bias is None else self.bias],
            [self.weight.rows],
            arrays,
        )
        out: list[Tensor]
        if self.settings.mode == "w4a16":
            read = ops.rotate(read, arrays).to(x.dtype) if rotated else read
            out = ops.linear_prepacked.float_activation(read.to(dtype), *weight)
        else:
            out = ops.linear_prepacked(read, self.activation_tables, self.activation_scale, *weight, dtype, rotated)
        return out[0]
