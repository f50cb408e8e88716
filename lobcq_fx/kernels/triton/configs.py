"""Launch configurations: what may be tuned, where a GPU's choices are kept, and how a launch finds its own.

`configs/<gpu>.json`, named by `gpu_name` and shipped with the package, holds what `tune.py` found for a GPU:
`{"decode": {"<rows> <N> <K> <format> <dtype>": {field: value}}, "prefill": {...}}`, with a bucket's rows, and N of all
weights of a launch. A shape that was not tuned, and a GPU that has no file, use the defaults. Choices wait for nothing
on the GPU, and are made once for a shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lobcq_fx.errors import LobcqError
from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.triton.products import num_terms

FOLDER = Path(__file__).parent / "configs"
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

KEY = re.compile(r"\d+ \d+ \d+ \d+x\d+ (int8|float16|bfloat16|float32)")


@dataclass(frozen=True)
class DecodeConfig:
    """Of `decode_gemm`.

    panels: of 16 outputs, that a program multiplies, a warp each.
    unroll: tiles of 128 columns of a turn of the loop.
    stages: turns that are loaded at a time, the one that is multiplied included.
    enough_programs: K is split until there are about as many.
    max_splits: among how many programs K is split at most; a power of two.
    """

    panels: int = 4
    unroll: int = 2
    stages: int = 3
    enough_programs: int = 528
    max_splits: int = 16

    def __post_init__(self) -> None:
        _check(self, powers_of_two=("panels", "max_splits"))


@dataclass(frozen=True)
class PrefillConfig:
    """Of `prefill_gemm`.

    tile_m, tile_n: rows and outputs of a program.
    step_columns: multiplied at a time where block arrays need no scaling of their own.
    group: tiles of rows that share a weight tile in L2 while it is there.
    warps, stages: as Triton means them.
    """

    tile_m: int = 128
    tile_n: int = 64
    step_columns: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 3

    def __post_init__(self) -> None:
        _check(self, powers_of_two=("tile_m", "tile_n", "step_columns", "warps"))
        if self.tile_n < 16 or self.step_columns not in (16, 32, 64, 128):
            raise LobcqError(f"tile_n={self.tile_n}, step_columns={self.step_columns}: a tile is 16 rows x 128 columns")


Config = TypeVar("Config", DecodeConfig, PrefillConfig)


@dataclass(frozen=True)
class Shape:
    """What a configuration is chosen for. rows: a bucket. n: outputs of all weights. dtype: the activation's."""

    rows: int
    n: int
    k: int
    spec: FormatSpec
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, n: int, spec: FormatSpec) -> Shape:
        """Of activation values [M, K], with M's bucket for rows: few shapes are told apart."""
        return cls(row_bucket(x.shape[0]), n, x.shape[1], spec, x.dtype)

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.rows} {self.n} {self.k} {self.spec.name} {str(self.dtype).removeprefix('torch.')}"


def row_bucket(rows: int) -> int:
    """The least bucket that has as many rows; the last has all that are more."""
    return next((bucket for bucket in ROW_BUCKETS if rows <= bucket), ROW_BUCKETS[-1])


def rows_to_warm(most: int) -> list[int]:
    """Numbers of rows, up to a largest, that between them launch every variant of every kernel.

    Variants differ by bucket, by the kernels for few and for many rows and the halves of the former, and in what Triton
    tells apart: one row, multiples of 16, others.
    """
    wanted = {1, 2, 9, 16, 17} | {rows for bucket in ROW_BUCKETS for rows in (bucket, bucket - 1)}
    return sorted(rows for rows in wanted if 0 < rows <= most)


@cache
def decode_config(shape: Shape, device: torch.device) -> DecodeConfig:
    """For a shape on a device."""
    return _tables(gpu_name(device))[0].get(shape.key, default_decode(shape))


@cache
def prefill_config(shape: Shape, device: torch.device) -> PrefillConfig:
    """For a shape on a device."""
    return _tables(gpu_name(device))[1].get(shape.key, default_prefill(shape))


def default_decode(shape: Shape) -> DecodeConfig:
    """Not measured. With three terms more would spill."""
    return DecodeConfig() if num_terms(shape.dtype) == 1 else DecodeConfig(panels=2, unroll=1)


def default_prefill(shape: Shape) -> PrefillConfig:
    """Not measured. With three terms more would spill."""
    return PrefillConfig() if num_terms(shape.dtype) == 1 else PrefillConfig(tile_m=64, tile_n=32, warps=4)


def decode_candidates(shape: Shape) -> Iterator[DecodeConfig]:
    """What is worth timing, the default first."""
    yield default_decode(shape)
    for panels, unroll, stages, programs in product((2, 4, 8), (1, 2), (2, 3, 4), (264, 528, 1056)):
        config = DecodeConfig(panels, unroll, stages, programs)
        if config != default_decode(shape):
            yield config


def prefill_candidates(shape: Shape) -> Iterator[PrefillConfig]:
    """What is worth timing, the default first."""
    yield default_prefill(shape)
    steps = (64, 128) if shape.dtype == torch.float16 else (64,)
    for tile_m, tile_n, step, warps, stages in product((64, 128), (64, 128), steps, (4, 8), (3, 4)):
        config = replace(
            default_prefill(shape), tile_m=tile_m, tile_n=tile_n, step_columns=step, warps=warps, stages=stages
        )
        if config != default_prefill(shape):
            yield config


def forget() -> None:
    """Read files anew from here on, and choose again."""
    for cached in (decode_config, prefill_config, _tables):
        cached.cache_clear()


@cache
def gpu_name(device: torch.device) -> str:
    """A file's name for a GPU: its own, in lower case with _ between words, and its compute capability."""
    if device.type != "cuda":
        return device.type
    name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")
    major, minor = torch.cuda.get_device_capability(device)
    return f"{name}_sm_{major}{minor}"


@cache
def _tables(name: str) -> tuple[dict[str, DecodeConfig], dict[str, PrefillConfig]]:
    path = FOLDER / f"{name}.json"
    return read_tables(path) if path.exists() else ({}, {})


def read_tables(path: Path) -> tuple[dict[str, DecodeConfig], dict[str, PrefillConfig]]:
    """What a GPU's file holds, by `Shape.key`.

    Raises:
        LobcqError: not such a file (says what is wrong, and where).
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise LobcqError(f"{path}: {error}") from error
    if not isinstance(found, dict) or set(found) - {"decode", "prefill"}:
        raise LobcqError(f"{path}: has to hold 'decode' and 'prefill', and nothing else")
    return _table(path, found, "decode", DecodeConfig), _table(path, found, "prefill", PrefillConfig)


def write_tables(path: Path, decode: Mapping[str, DecodeConfig], prefill: Mapping[str, PrefillConfig]) -> None:
    """Inverse of `read_tables`."""
    found = {
        "decode": {key: asdict(config) for key, config in sorted(decode.items())},
        "prefill": {key: asdict(config) for key, config in sorted(prefill.items())},
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _table(path: Path, found: Mapping[str, Any], name: str, kind: type[Config]) -> dict[str, Config]:
    known = {field.name for field in fields(kind)}
    table = {}
    for key, values in found.get(name, {}).items():
        if not KEY.fullmatch(key):
            raise LobcqError(f"{path}: {name} {key!r}: write '<rows> <N> <K> <format> <dtype>'")
        if not isinstance(values, dict) or set(values) != known:
            raise LobcqError(f"{path}: {name} {key!r} has to hold {', '.join(sorted(known))}, and nothing else")
        try:
            table[key] = kind(**values)
        except LobcqError as error:
            raise LobcqError(f"{path}: {name} {key!r}: {error}") from error
    return table


def _check(config: DecodeConfig | PrefillConfig, powers_of_two: tuple[str, ...]) -> None:
    for name, value in asdict(config).items():
        if type(value) is not int or value < 1:
            raise LobcqError(f"{name}={value!r}: write a positive integer")
        if name in powers_of_two and value & (value - 1):
            raise LobcqError(f"{name}={value}: write a power of two")
