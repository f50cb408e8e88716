"""Blocks on the format's grid, read from float block arrays a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lobcq_fx.errors import CalibrationError
from lobcq_fx.format.codes import to_grid
from lobcq_fx.format.scales import array_scales, tensor_scale_of_absmax
from lobcq_fx.format.spec import BLOCK_SIZE, FormatSpec

CHUNK_SCALARS = 1 << 18
"""Scalars normalised at a time."""

CACHE_SCALARS = 1 << 26
"""Grid values kept between passes (as int16, 128 MiB); a longer source is read again on each pass."""


class GridBlocks:
    """The normalised blocks of a source of block arrays: iterable any number of times, int16 [n, 8] a chunk.

    All-zero arrays are left out: their scale is 0, so no codebook can change what they decode to.
    """

    def __init__(
        self,
        arrays: Tensor | Iterable[Tensor],
        spec: FormatSpec,
        tensor_scale: Tensor | None = None,
        cache_scalars: int = CACHE_SCALARS,
    ) -> None:
        """Read the source once for its tensor scale, unless that is given.

        Args:
            arrays: float [n, L_A], or an iterable of such tensors that can be iterated again and again.
            spec: gives L_A.
            tensor_scale: fp32 []; None for the weight rule over the whole source, absmax / 13888.
            cache_scalars: most grid values kept in memory between passes.

        Raises:
            CalibrationError: no arrays, a wrong shape, a source that can be read only once, NaN or infinity.
        """
        if isinstance(arrays, Iterator):
            raise CalibrationError(
                "arrays is an iterator, which can be read only once, and a fit reads its data many times: pass a "
                "tensor, a list, or an object whose __iter__ starts anew"
            )
        self._arrays = arrays
        self._spec = spec
        self._cache_scalars = cache_scalars
        self._cache: list[Tensor] | None = None
        absmax = self._absmax()
        self._tensor_scale = tensor_scale_of_absmax(absmax) if tensor_scale is None else tensor_scale.float().cpu()

    def __iter__(self) -> Iterator[Tensor]:
        if self._cache is not None:
            yield from self._cache
            return
        kept: list[Tensor] | None = []
        kept_scalars = 0
        for chunk in self._chunks():
            blocks = self._normalise(chunk)
            kept_scalars += blocks.numel()
            if kept_scalars > self._cache_scalars:
                kept = None
            if kept is not None:
                kept.append(blocks)
            yield blocks
        self._cache = kept

    def _normalise(self, arrays: Tensor) -> Tensor:
        scales = array_scales(arrays, self._tensor_scale)
        used = scales.float() > 0
        arrays, scales = arrays[used].unsqueeze(0), scales[used].unsqueeze(0)
        return to_grid(arrays, scales, self._tensor_scale).view(-1, BLOCK_SIZE).short()

    def _chunks(self) -> Iterator[Tensor]:
        """The source as fp32 [n, L_A] on the CPU, at most CHUNK_SCALARS each."""
        for tensor in [self._arrays] if isinstance(self._arrays, Tensor) else self._arrays:
            if tensor.dim() != 2 or tensor.shape[1] != self._spec.array_size:
                raise CalibrationError(
                    f"block arrays have shape {list(tensor.shape)}: format {self._spec.name} fits codebooks on "
                    f"[n, {self._spec.array_size}]"
                )
            for part in tensor.detach().split(CHUNK_SCALARS // self._spec.array_size):
                yield part.float().cpu()

    def _absmax(self) -> Tensor:
        """Largest magnitude of the whole source, fp32 []."""
        largest, num_arrays = torch.zeros((), dtype=torch.float32, device="cpu"), 0
        for chunk in self._chunks():
            num_arrays += chunk.shape[0]
            if not bool(torch.isfinite(chunk).all()):
                bad = (~torch.isfinite(chunk)).any(dim=1).nonzero()[0, 0] + num_arrays - chunk.shape[0]
                raise CalibrationError(f"block array {int(bad)} holds NaN or infinity: leave it out of the fit")
            if chunk.numel():
                largest = torch.maximum(largest, chunk.abs().max())
        if num_arrays == 0:
            raise CalibrationError("no block arrays to fit codebooks on: run the calibration data first")
        return largest
