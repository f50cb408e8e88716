"""Activations in int8, one scale a block array and no codebooks: what W4A8 multiplies LO-BCQ weights with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lobcq_fx.format.codes import CHUNK
from lobcq_fx.format.operand import check_operand, given_tensor_scale
from lobcq_fx.format.scales import absmax_row_scale, block_arrays, int8_array_scales
from lobcq_fx.format.spec import INT8_MAX, FormatSpec


@dataclass(frozen=True)
class Int8Activation:
    """An activation [R, K] in int8 (Kp = K rounded up to a multiple of L_A).

    entries: int8 [R, Kp] in [-127, 127], zeros from column K on.
    scales: float8_e4m3fn [R, Kp/L_A].
    tensor_scale: fp32, [] for one scale or [R, 1] for one a row.
    columns: K.
    """

    entries: Tensor
    scales: Tensor
    tensor_scale: Tensor
    columns: int

    @classmethod
    def flattened(cls, entries: Tensor, scales: Tensor, tensor_scale: Tensor, columns: int) -> Int8Activation:
        """Of parts with any leading dimensions, the same for all of them."""
        rows = entries.shape[:-1].numel()
        entries, scales, tensor_scale = (part.reshape(rows, part.shape[-1]) for part in (entries, scales, tensor_scale))
        return cls(entries, scales, tensor_scale, columns)

    def rows(self, start: int, stop: int) -> Int8Activation:
        """Rows start to stop, as views."""
        part = slice(start, stop)
        scale = self.tensor_scale[part] if self.tensor_scale.dim() else self.tensor_scale
        return replace(self, entries=self.entries[part], scales=self.scales[part], tensor_scale=scale)

    def scaled_entries(self) -> Tensor:
        """Entry times block-array scale, exact, fp32 [R, K]."""
        array_size = self.entries.shape[1] // max(1, self.scales.shape[1])
        scaled = self.entries.float().view(*self.scales.shape, array_size) * self.scales.float().unsqueeze(-1)
        return scaled.flatten(1)[:, : self.columns]


def encode_int8(x: Tensor, array_size: int, tensor_scale: Tensor | None = None) -> Int8Activation:
    """Encode an activation along its last dimension.

    Args:
        x: [R, K], fp32, bf16 or fp16 (converted to fp32 first).
        array_size: L_A, 16, 32, 64 or 128.
        tensor_scale: None for one computed for each row (absmax / 56896); or fp32, positive, a scalar (a static scale)
            or [R, 1] (one a row).

    Returns:
        The entries and their scales. NaN or infinity in x marks its block array with a NaN scale and, but for a static
        tensor scale, its row with a NaN tensor scale: it decodes to NaN and disturbs no other row.

    Raises:
        ValueError: a wrong shape or dtype, or another array size.
    """
    check_operand(x)
    x, spec = x.detach(), FormatSpec(1, array_size)
    scale = absmax_row_scale(x, INT8_MAX) if tensor_scale is None else given_tensor_scale(x, tensor_scale)
    rows, columns = x.shape
    entries = torch.empty((rows, spec.padded_columns(columns)), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, spec.num_arrays(columns)), dtype=torch.float8_e4m3fn, device=x.device)
    step = max(1, CHUNK // max(1, spec.padded_columns(columns)))
    for start in range(0, rows if columns else 0, step):
        part = slice(start, start + step)
        arrays, row_scale = block_arrays(x[part], spec), scale[part] if scale.dim() else scale
        scales[part] = int8_array_scales(arrays, row_scale)
        entries[part] = _entries(arrays, scales[part], row_scale).flatten(1)
    return Int8Activation(entries, scales, scale, columns)


def _entries(arrays: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """int8 [R, G, L_A]: `rint(x / (scale * tensor_scale))`, clamped; 0 where that divisor is 0 or NaN."""
    divisor = (scales.float() * tensor_scale).unsqueeze(-1)
    usable = (divisor != 0) & ~divisor.isnan()
    normalised = torch.where(usable, arrays / divisor, 0.0)
    return normalised.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
