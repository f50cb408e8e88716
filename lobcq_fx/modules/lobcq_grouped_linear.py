"""A stack of packed weights, one of each expert, for models that stay modules; it calls the ops of the passes."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

import lobcq_fx.ops  # noqa: F401  (registers the ops)
from lobcq_fx.errors import LobcqError
from lobcq_fx.format.stacked import group_bounds
from lobcq_fx.modules.packed_product import LayoutOf, LinearSettings, PackedProduct
from lobcq_fx.modules.packed_weight import PARTS, PackedWeight, empty_weight
from lobcq_fx.modules.straight_through import through

ops = torch.ops.lobcq


class LobcqGroupedLinear(PackedProduct, PackedWeight):
    """`x[group e] @ w[e].T` for each of E groups of rows, fp32, bf16 or fp16; the result is as x.

    It is the packed weight [E, N, K] itself, so that its tensors lie under the name of the parameter that it replaces.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        settings: LinearSettings,
        layout_of: LayoutOf,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """A stack without content, for tensors to be put in.

        Args:
            shape: (E, N, K).
            settings: how it computes.
            layout_of: of a device, how its kernels want weights.
            dtype: of the input scale.
            device: of all tensors.
        """
        PackedWeight.__init__(self, empty_weight(shape, settings.spec, device))
        self.settings, self.layout_of = settings, layout_of
        _, self.out_features, self.in_features = shape
        self._add_constants(dtype, device)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.stack[0]

    @property
    def packed(self) -> PackedWeight:
        """The stack: itself."""
        return self

    def forward(self, x: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:
        """The products, with the activation encoded as the settings say, each row once. Gradients as of `LobcqLinear`.

        Args:
            x: [T, K].
            offsets: int32 [E], where each group ends.
            rows: int64 [S], what the groups are made of; None: all rows of x, in order.

        Returns:
            [T or S, N]; zeros in the rows of no group.

        Raises:
            OperandError: an operand is none, or a row does not exist.
        """
        self._check(x)
        return through(
            x, lambda x: self._products(x, offsets, rows), lambda out: self._to_input(out, offsets, rows, len(x))
        )

    def _products(self, x: Tensor, offsets: Tensor, rows: Tensor | None) -> Tensor:
        if self.input_scale is not None:
            x = x * self.input_scale
        return self._stored(x, offsets, rows) if self.layout is None else self._prepacked(x, offsets, rows)

    def _to_input(self, gradient: Tensor, offsets: Tensor, rows: Tensor | None, count: int) -> Tensor:
        """count: T."""
        bounds = group_bounds(offsets.tolist(), len(gradient))
        out = torch.zeros((len(gradient), self.local_in_features), dtype=torch.float32, device=gradient.device)
        for (start, stop), weight in zip(bounds, self.matrices(self.codebooks), strict=True):
            out[start:stop] = gradient[start:stop].float() @ weight[:, : self.local_in_features]
        if self.settings.rotated:  # the rotation is its own inverse
            out = ops.rotate(out, self.settings.activations.array_size)
        if self.input_scale is not None:
            out = out * self.input_scale
        if rows is None:
            return out
        return out.new_zeros((count, self.local_in_features)).index_add_(0, rows, out)

    def prepack(self) -> None:
        """Hold the stack in the layout of its device's kernels, if those take stacks."""
        layout = self.layout_of(self.codebooks.device)
        if layout is not None and layout.stacks:
            super().prepack()

    def _stored(self, x: Tensor, offsets: Tensor, rows: Tensor | None) -> Tensor:
        weight = (*(getattr(self, part) for part in PARTS), self.codebooks, offsets, rows)
        mode, size, arrays = self.settings.mode, self.settings.spec.array_size, self.settings.activations.array_size
        read, rotated = self._to_encode(x)
        read = ops.rotate(read, arrays) if rotated else read
        out: Tensor
        if mode == "w4a16":
            out = ops.grouped_linear.float_activation(read.to(x.dtype), *weight, size)
        elif mode == "w4a8":
            encoded = ops.quantize_activation_int8(read, size, self.activation_scale)
            out = ops.grouped_linear.int8_activation(*encoded, *weight, self.columns, size, x.dtype)
        else:
            encoded = ops.quantize_activation(read, self.activation_codebooks, arrays, self.activation_scale)
            tail = (self.columns, size, x.dtype, arrays)
            out = ops.grouped_linear(*encoded, self.activation_codebooks, *weight, *tail)
        return out

    def _prepacked(self, x: Tensor, offsets: Tensor, rows: Tensor | None) -> Tensor:
        arrays = self.settings.activations.array_size
        read, rotated = self._to_encode(x)
        stack = (self.prepacked, self.tensor_scale, self.codebook_tables, offsets, rows, self.rows, arrays)
        out: Tensor
        if self.settings.mode == "w4a16":
            read = ops.rotate(read, arrays).to(x.dtype) if rotated else read
            out = ops.grouped_linear_prepacked.float_activation(read, *stack)
        else:
            encoder = self.activation_tables, self.activation_scale
            out = ops.grouped_linear_prepacked(read, *encoder, *stack, x.dtype, rotated)
        return out

    def __getitem__(self, expert: object) -> NoReturn:
        raise LobcqError(
            "packed experts are not taken out one by one, as experts_implementation='eager' does. Remedy:"
            " model.set_experts_implementation('lobcq'), which from_pretrained did"
        )
