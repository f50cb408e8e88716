"""What a vision-language model's processor makes of images, as the tensors that its vision graph takes.

What depends on values (which tiles are padding, where a window of patches begins) is decided here, outside the graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from lobcq_fx.errors import CallError

PIXELS, GRID, PIXEL_MASK = "pixel_values", "image_grid_thw", "pixel_attention_mask"


@dataclass(frozen=True)
class ImageInputs(ABC):
    """How one kind of vision-language model takes images.

    config: the model's configuration. dtype: of its vision tower.
    """

    kind: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]
    """What a call of the model has of images."""

    config: Any
    dtype: torch.dtype

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the vision graph's inputs, pixels first."""

    @property
    @abstractmethod
    def ranks(self) -> tuple[int, ...]:
        """How many dimensions each of them has."""

    @abstractmethod
    def tensors(self, call: Mapping[str, Any], device: torch.device) -> list[Tensor]:
        """The vision graph's inputs for a call; those of no image where it brings none.

        Raises:
            CallError: they are missing, or of another form than the model takes.
        """

    @abstractmethod
    def example(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """What a call has of `count` made-up images."""

    def apart(self, call: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """A call's images in parts that the vision graph takes one after the other, in their order."""
        return [call]

    def shares(self, call: Mapping[str, Any], total: int) -> list[int]:
        """How many of the features of an example's images are of which."""
        count = self.tensors(call, call[PIXELS].device)[0].shape[0]
        return [total // count] * count

    def _pixels(self, call: Mapping[str, Any], shape: Sequence[int | None], meaning: str) -> Tensor:
        """The pixels of a call, of a shape in which None stands for any size, in the dtype of the vision tower."""
        value = call[PIXELS]
        fits = isinstance(value, Tensor) and value.dim() == len(shape) and value.is_floating_point()
        if not fits or any(want is not None and want != have for want, have in zip(shape, value.shape, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise CallError(f"{PIXELS} is {described(value)}: pass a float tensor [{wanted}], {meaning}")
        pixels: Tensor = value.to(self.dtype)
        return pixels

    @property
    def _size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the vision tower was made for."""
        vision = self.config.vision_config
        size = vision.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return getattr(vision, "num_channels", 3), height, width


class FixedImages(ImageInputs):
    """Images of one size, [N, C, H, W], as LLaVA, PaliGemma and Gemma 3 take them."""

    kind: ClassVar[str] = "fixed"
    arguments: ClassVar[tuple[str, ...]] = (PIXELS,)
    names = (PIXELS,)
    ranks = (4,)

    def tensors(self, call: Mapping[str, Any], device: torch.device) -> list[Tensor]:
        """See the base class."""
        if call.get(PIXELS) is None:
            return [torch.empty((0, *self._size), dtype=self.dtype, device=device)]
        return [self._pixels(call, (None, *self._size), "images of the size that the model was made for")]

    def example(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """See the base class."""
        return {PIXELS: noise((count, *self._size), self.dtype, device)}


class ImageTiles(ImageInputs):
    """Images cut into tiles, [B, n, C, H, W] with tiles of zeros as padding, as Idefics 3 and SmolVLM take them."""

    kind: ClassVar[str] = "tiles"
    arguments: ClassVar[tuple[str, ...]] = (PIXELS, PIXEL_MASK)
    names = (PIXELS, "patch_attention_mask")
    ranks = (4, 3)

    def tensors(self, call: Mapping[str, Any], device: torch.device) -> list[Tensor]:
        """The real tiles [N, C, H, W], and which of their patches show anything, bool [N, H / P, W / P]."""
        _, height, width = self._size
        patch = self.config.vision_config.patch_size
        if call.get(PIXELS) is None:
            empty = torch.empty((0, *self._size), dtype=self.dtype, device=device)
            return [empty, torch.empty((0, height // patch, width // patch), dtype=torch.bool, device=device)]
        pixels = self._pixels(call, (None, None, *self._size), "tiles of the size that the model was made for")
        pixels = pixels.flatten(0, 1)
        real = (pixels != 0).flatten(1).any(dim=1)
        mask = call.get(PIXEL_MASK)
        if mask is None:
            mask = torch.ones((len(pixels), height, width), dtype=torch.bool, device=pixels.device)
        elif not isinstance(mask, Tensor) or mask.shape != (*call[PIXELS].shape[:2], height, width):
            wanted = [*call[PIXELS].shape[:2], height, width]
            raise CallError(f"{PIXEL_MASK} is {described(mask)}: pass {wanted}, of the tiles' pixels")
        patches = mask.reshape(-1, height, width).bool()[real]
        patches = patches.unfold(1, patch, patch).unfold(2, patch, patch).any(dim=-1).any(dim=-1)
        return [pixels[real], patches]

    def example(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """See the base class; the last tile's lowest rows are padding."""
        pixels = noise((1, count, *self._size), self.dtype, device)
        mask = torch.ones((1, count, *self._size[1:]), dtype=torch.long, device=device)
        mask[:, -1, -self.config.vision_config.patch_size :] = 0
        return {PIXELS: pixels, PIXEL_MASK: mask}


class ImagePatches(ImageInputs):
    """Images of any size as rows of patches [S, K], with the grid that each came from, as Qwen's models take them.

    The vision graph lets a patch attend to those of its own segment: an image, or a window of one.
    """

    kind: ClassVar[str] = "patches"
    arguments: ClassVar[tuple[str, ...]] = (PIXELS, GRID)

    @property
    def names(self) -> tuple[str, ...]:
        """See the base class."""
        vision = self.config.vision_config
        windows = ("window_rows", "window_segments", "window_index") if hasattr(vision, "window_size") else ()
        interpolated = ("interp_indices", "interp_weights") if hasattr(vision, "num_position_embeddings") else ()
        return (PIXELS, "position_ids", "segments", *windows, *interpolated)

    @property
    def ranks(self) -> tuple[int, ...]:
        """See the base class."""
        return tuple(1 if name == "segments" or name.startswith("window") else 2 for name in self.names)

    def tensors(self, call: Mapping[str, Any], device: torch.device) -> list[Tensor]:
        """The patches, their places [S, 2], their segments [S], and what else `names` has, of S or S / m^2 rows.

        Windows are blocks of patches: rows in the order of windows, their segments, and blocks in that order.
        """
        if call.get(PIXELS) is None:
            return self._none(device)
        vision, grid = self.config.vision_config, self._grid(call)
        merge, patches = vision.spatial_merge_size, int(grid.prod(dim=1).sum())
        values = {
            PIXELS: self._pixels(call, (patches, self._width), f"the patches of {GRID}"),
            "position_ids": get_vision_position_ids(grid, merge),
            "segments": segments_of(get_vision_cu_seqlens(grid), patches),
        }
        if "window_index" in self.names:
            index, bounds = get_vision_window_index(grid, merge, vision.window_size, vision.patch_size)
            index, within = index.to(grid.device), torch.arange(merge**2, dtype=torch.long, device=grid.device)
            values |= {
                "window_rows": (index[:, None] * merge**2 + within).flatten(),
                "window_segments": segments_of(bounds, patches),
                "window_index": index,
            }
        if "interp_indices" in self.names:
            side = int(vision.num_position_embeddings**0.5)
            values["interp_indices"], values["interp_weights"] = get_vision_interpolation_indices_and_weights(
                grid, side, align_corners=True, spatial_merge_size=merge
            )
        return [values[name] for name in self.names]

    def _none(self, device: torch.device) -> list[Tensor]:
        """The same of no image."""
        widths = {PIXELS: self._width, "position_ids": 2, "interp_indices": 4, "interp_weights": 4}
        dtypes = {PIXELS: self.dtype, "interp_weights": torch.float32}
        return [
            torch.empty(
                (0, widths[name]) if name in widths else (0,), dtype=dtypes.get(name, torch.long), device=device
            )
            for name in self.names
        ]

    def example(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """See the base class; no two images are of one size."""
        merge = self.config.vision_config.spatial_merge_size
        grid = torch.tensor([[1, merge * (n + 1), merge * 2] for n in range(count)], dtype=torch.long, device=device)
        return {PIXELS: noise((int(grid.prod(dim=1).sum()), self._width), self.dtype, device), GRID: grid}

    def apart(self, call: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Image by image: a mask over the patches of all would grow with the square of their number."""
        if call.get(PIXELS) is None:
            return [call]
        grid = self._grid(call)
        self._pixels(call, (int(grid.prod(dim=1).sum()), self._width), f"the patches of {GRID}")
        pixels = call[PIXELS].split(grid.prod(dim=1).tolist())
        return [{**call, PIXELS: one, GRID: size} for one, size in zip(pixels, grid.split(1), strict=True)]

    def shares(self, call: Mapping[str, Any], total: int) -> list[int]:
        """See the base class."""
        return [int(n) // self.config.vision_config.spatial_merge_size**2 for n in call[GRID].prod(dim=1)]

    @property
    def _width(self) -> int:
        """Scalars of a patch."""
        vision = self.config.vision_config
        channels = getattr(vision, "in_channels", None) or vision.in_chans
        return int(channels * vision.temporal_patch_size * vision.patch_size**2)

    def _grid(self, call: Mapping[str, Any]) -> Tensor:
        """Time, height and width of each image in patches, int64 [N, 3]."""
        grid, merge = call.get(GRID), self.config.vision_config.spatial_merge_size
        if not isinstance(grid, Tensor) or grid.dim() != 2 or grid.shape[1] != 3 or grid.is_floating_point():
            raise CallError(f"{GRID} is {described(grid)}: pass int64 [images, 3] of time, height and width in patches")
        if bool((grid < 1).any()) or bool((grid[:, 1:] % merge != 0).any()):
            raise CallError(f"{GRID} is {grid.tolist()}: heights and widths are to be multiples of {merge}")
        return grid.long()


KINDS: Mapping[str, type[ImageInputs]] = {one.kind: one for one in (FixedImages, ImageTiles, ImagePatches)}


def segments_of(bounds: Tensor, length: int) -> Tensor:
    """Which segment each of `length` rows is in, int64 [length], from where segments begin and end."""
    rows = torch.arange(length, dtype=bounds.dtype, device=bounds.device)
    return torch.searchsorted(bounds[1:].contiguous(), rows, right=True)


def noise(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same normal numbers each time, everywhere."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)


def described(value: object) -> str:
    """A value as error messages name it."""
    if value is None:
        return "missing"
    return f"a {value.dtype} of {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
