"""A packed weight as a module: tensors named as they are stored, indifferent to dtype casts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

import lobcq_fx.ops  # noqa: F401  (registers the op that decodes)
from lobcq_fx.format import Encoded, EncodedStack, FormatSpec

PARTS = ("codes", "selectors", "scales", "tensor_scale")
PREPACKED = "prepacked"

Parts = tuple[Tensor, Tensor, Tensor]
"""Codes, selectors and scales, as in `lobcq_fx.format.Encoded`."""


def parts_of(
    rows: int, columns: int, spec: FormatSpec, stack: tuple[int, ...] = ()
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each of `PARTS` of a weight [rows, columns]; stack: (E,) for E of them."""
    return {
        "codes": (torch.uint8, (*stack, rows, spec.code_bytes(columns))),
        "selectors": (torch.uint8, (*stack, rows, spec.selector_bytes(columns))),
        "scales": (torch.float8_e4m3fn, (*stack, rows, spec.num_arrays(columns))),
        "tensor_scale": (torch.float32, stack),
    }


def empty_weight(shape: tuple[int, ...], spec: FormatSpec, device: torch.device) -> Encoded | EncodedStack:
    """A weight (N, K), or a stack (E, N, K), whose parts have no content."""
    *stack, rows, columns = shape
    kinds = parts_of(rows, columns, spec, tuple(stack)) | {"codebooks": (torch.int8, (spec.num_codebooks, 16))}
    parts = {name: torch.empty(size, dtype=dtype, device=device) for name, (dtype, size) in kinds.items()}
    return (EncodedStack if stack else Encoded)(**parts, spec=spec, columns=columns)


class WeightLayout(Protocol):
    """How the kernels of one device want a weight to lie in memory.

    stacks: whether the device has kernels for stacks of weights, each matrix laid out for itself.
    """

    stacks: ClassVar[bool]

    def pack(self, parts: Parts, spec: FormatSpec, columns: int) -> Tensor:
        """The weight [N, columns] in kernel layout, uint8 [bytes]."""

    def unpack(self, prepacked: Tensor, spec: FormatSpec, rows: int, columns: int) -> Parts:
        """Inverse of `pack`."""

    def tables(self, codebooks: Tensor) -> Tensor:
        """What the kernels look up for codebooks int8 [N_c, 16], uint8 [bytes]."""


class PackedWeight(nn.Module):
    """Holds an encoded weight [N, K] in place of the float parameter, so that its buffers are `<parameter>.codes`, ...

    Or a stack of E of them, whose parts have E as their first dimension; `stack` is then (E,), otherwise ().
    `repack` replaces codes, selectors and scales by one buffer, `prepacked`, in a device's kernel layout; the bytes are
    held once. State dicts have the parts all the same. `.to(device)` moves buffers; `.half()` and the like leave them
    alone: they are the format's bytes, not numbers.
    """

    codes: Tensor
    selectors: Tensor
    scales: Tensor
    tensor_scale: Tensor
    prepacked: Tensor

    def __init__(self, encoded: Encoded | EncodedStack) -> None:
        super().__init__()
        self.spec, (*stack, self.rows, self.columns) = encoded.spec, encoded.shape
        self.stack = tuple(stack)
        self.kernel_spec = self.spec
        self.layout: WeightLayout | None = None
        for part in PARTS:
            self.register_buffer(part, getattr(encoded, part))

    @classmethod
    def empty(cls, shape: tuple[int, ...], spec: FormatSpec, device: torch.device) -> PackedWeight:
        """A weight (N, K), or a stack (E, N, K), of no content, for its parts to be put in."""
        return cls(empty_weight(shape, spec, device))

    @property
    def device(self) -> torch.device:
        """Where it is, for those who take it for a tensor."""
        return self.tensor_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its bytes, for the same."""
        return torch.uint8

    def repack(self, layout: WeightLayout, array_size: int | None = None) -> None:
        """Hold the bytes in a kernel layout from now on.

        Args:
            layout: of a device's kernels.
            array_size: L_A that they multiply in, where the weight's is a multiple of it: each scale is held as often,
                which changes no number. K must then be a multiple of the weight's.
        """
        self.kernel_spec = self.spec if array_size is None else replace(self.spec, array_size=array_size)
        assert self.kernel_spec == self.spec or self.columns % self.spec.array_size == 0, "padding would not come back"
        scales = self.scales.view(torch.uint8).repeat_interleave(self._scale_copies, dim=-1).view(self.scales.dtype)
        parts = (self.codes, self.selectors, scales)
        if self.stack:
            matrices = zip(*parts, strict=True)
            prepacked = torch.stack([layout.pack(one, self.kernel_spec, self.columns) for one in matrices])
        else:
            prepacked = layout.pack(parts, self.kernel_spec, self.columns)
        del self.codes, self.selectors, self.scales
        self.register_buffer(PREPACKED, prepacked, persistent=False)
        self.layout = layout

    def restore(self) -> None:
        """Hold the bytes as they are stored again."""
        parts = self._parts()
        del self.prepacked
        self.layout = None
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)

    def hold(self, parts: Mapping[str, Tensor], columns: int) -> None:
        """Hold another weight of the same format, as it is stored: its parts by name, and K."""
        assert self.layout is None, "in a kernel layout"
        *stack, self.rows, _ = parts["codes"].shape
        self.stack, self.columns = tuple(stack), columns
        for name, tensor in parts.items():
            delattr(self, name)  # perhaps no buffer, but a parameter of several processes
            self.register_buffer(name, tensor)

    def matrices(self, codebooks: Tensor) -> Iterator[Tensor]:
        """The decoded weight, fp32 [N, K], or those of a stack one by one.

        codebooks: int8 [N_c, 16], that it was encoded with.
        """
        parts = {part: getattr(self, part) for part in PARTS} if self.layout is None else self._parts()
        parts["tensor_scale"] = self.tensor_scale
        for matrix in zip(*parts.values(), strict=True) if self.stack else [parts.values()]:
            yield torch.ops.lobcq.dequantize_weight(*matrix, codebooks, self.columns, self.spec.array_size)

    def _parts(self) -> dict[str, Tensor]:
        """Codes, selectors and scales from the kernel layout."""
        assert self.layout is not None, "not in a kernel layout"
        size = self.kernel_spec, self.rows, self.columns
        if self.stack:
            matrices = [self.layout.unpack(one, *size) for one in self.prepacked]
            # torch stacks no E4M3: its bytes are.
            stacked = (torch.stack([part.view(torch.uint8) for part in one]) for one in zip(*matrices, strict=True))
            codes, selectors, scales = stacked
            scales = scales.view(torch.float8_e4m3fn)
        else:
            codes, selectors, scales = self.layout.unpack(self.prepacked, *size)
        return dict(zip(PARTS, (codes, selectors, scales[..., :: self._scale_copies].contiguous()), strict=False))

    @property
    def _scale_copies(self) -> int:
        return self.spec.array_size // self.kernel_spec.array_size

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout is not None:
            destination.update({prefix + name: tensor for name, tensor in self._parts().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        layout = self.layout
        if layout is not None:
            self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        if layout is not None:
            self.repack(layout, self.kernel_spec.array_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        # fn sees bytes, which no dtype cast touches.
        for name, buffer in self.named_buffers():
            moved = fn(buffer.reshape(-1).view(torch.uint8))
            setattr(self, name, moved.view(buffer.dtype).view(buffer.shape))
        return self
