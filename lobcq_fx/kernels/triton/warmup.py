"""Compiling what a model will launch before it is asked for anything: Triton compiles a kernel on its first launch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.kernels.triton.configs import ROW_BUCKETS
from lobcq_fx.kernels.triton.decode_gemm import MAX_ROWS
from lobcq_fx.kernels.triton.torch_ops import linear_prepacked, linear_prepacked_float_activation
from lobcq_fx.kernels.triton.weight_layout import CudaWeightLayout, num_panels, num_tiles, tile_bytes


@dataclass(frozen=True)
class Linears:
    """Linears of one activation, as one call of a prepacked op has them.

    out_features: of each. biases: whether each has one, in `dtype`. activation: its number of codebooks; None where the
    activation is not encoded (W4A16). static_scale: whether the activation's tensor scale is calibrated.
    dtype: of activation and result.
    """

    in_features: int
    out_features: tuple[int, ...]
    biases: tuple[bool, ...]
    spec: FormatSpec
    activation: int | None
    static_scale: bool
    dtype: torch.dtype


def rows_to_warm(most: int) -> list[int]:
    """Numbers of rows, up to a largest, that between them launch every variant of every kernel.

    Variants differ by bucket, and in what Triton tells apart: one row, multiples of 16, others.
    """
    wanted = {1, 2, MAX_ROWS // 2 + 1, MAX_ROWS, MAX_ROWS + 1}
    wanted |= {rows for bucket in ROW_BUCKETS for rows in (bucket, bucket - 1)}
    return sorted(rows for rows in wanted if 0 < rows <= most)


def warmup(linears: Iterable[Linears], rows: Iterable[int], device: torch.device) -> None:
    """Run every distinct linear once for each number of rows, on zeros.

    Args:
        linears: of the model; those that are alike are run once.
        rows: `rows_to_warm`, or the numbers of rows that will occur.
        device: the model's.
    """
    numbers = sorted(set(rows))
    for one in dict.fromkeys(linears):
        for count in numbers:
            _run(one, count, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _run(one: Linears, rows: int, device: torch.device) -> None:
    layout, k, spec = CudaWeightLayout(), one.in_features, one.spec
    x = torch.zeros(rows, k, dtype=one.dtype, device=device)
    sizes = [num_panels(n) * num_tiles(k) * sum(tile_bytes(spec)) for n in one.out_features]
    weights = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]
    scales = [torch.ones((), device=device) for _ in sizes]
    shapes = [n if has else 0 for n, has in zip(one.out_features, one.biases, strict=True)]
    biases = [torch.zeros(n, dtype=one.dtype, device=device) for n in shapes]
    tables = layout.tables(universal_codebooks(spec.num_codebooks).to(device))
    tail = (weights, scales, tables, biases, list(one.out_features), spec.array_size)
    if one.activation is None:
        linear_prepacked_float_activation(x, *tail)
    else:
        static = torch.ones((), device=device) if one.static_scale else None
        linear_prepacked(x, layout.tables(universal_codebooks(one.activation).to(device)), static, *tail, one.dtype)
