"""Find launch configurations for a GPU, and write the file that the package ships for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.linears import encoded_weight
from lobcq_fx.format import FormatSpec, decode
from lobcq_fx.kernels.triton.configs import (
    FOLDER,
    DecodeConfig,
    PrefillConfig,
    forget,
    gpu_name,
    read_tables,
    write_tables,
)
from lobcq_fx.kernels.triton.encode_operand import encode_operand
from lobcq_fx.kernels.triton.lookup import Lookup
from lobcq_fx.kernels.triton.operands import Activation, Epilogue, Linear
from lobcq_fx.kernels.triton.torch_ops import INTEGER_ARRAY
from lobcq_fx.kernels.triton.tune import tune_decode, tune_prefill
from lobcq_fx.kernels.triton.weight_layout import CudaWeightLayout, WeightTiles

FEW, MANY = (1, 4, 16), (2048,)


def tune(
    linears: dict[str, tuple[int, int]], formats: list[str], seconds: float, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Time candidates, shape by shape, until the time is up; what is found joins what the GPU's file has.

    Yields:
        After each shape the file, its contents, for each key found its milliseconds, and what failed.
    """
    path = FOLDER / f"{gpu_name(device)}.json"
    path.parent.mkdir(exist_ok=True)
    decoding, prefilling = read_tables(path) if path.exists() else ({}, {})
    found: dict[str, float] = {}
    failed: dict[str, str] = {}
    start = time.monotonic()
    for run, table in runs(linears, formats, device):
        if time.monotonic() - start > seconds:
            break
        try:
            key, config, milliseconds = run()
            (decoding if table == "decode" else prefilling)[key] = config
            found[key] = milliseconds
        except Exception as error:  # one shape that cannot be tuned keeps its default
            failed[f"{table} {run.args[:3]}"] = f"{type(error).__name__}: {error}"
        write_tables(path, decoding, prefilling)
        forget()
        yield {"file": path.name, "milliseconds": found, "failed": failed, "configurations": path.read_text("utf-8")}


def runs(
    linears: dict[str, tuple[int, int]], formats: list[str], device: torch.device
) -> Iterator[tuple[partial[tuple[str, DecodeConfig | PrefillConfig, float]], str]]:
    """What can be tuned, few rows first, each with the name of its table."""
    for rows in (*FEW, *MANY):
        for name in formats:
            for shape in linears.values():
                few = rows in FEW
                yield (
                    partial(_tune_one, shape, FormatSpec.from_name(name), rows, few, device),
                    ("decode" if few else "prefill"),
                )


def _tune_one(
    shape: tuple[int, int], spec: FormatSpec, rows: int, few: bool, device: torch.device
) -> tuple[str, DecodeConfig | PrefillConfig, float]:
    generator = torch.Generator(device).manual_seed(sum(shape))
    encoded = encoded_weight(torch.randn(shape, generator=generator, device=device) * 0.02, spec)
    books, parts = encoded.codebooks, (encoded.codes, encoded.selectors, encoded.scales)
    packed = CudaWeightLayout().pack(parts, spec, shape[1])
    linear = Linear(WeightTiles.of(packed, spec, *shape), shape[0], Epilogue(encoded.tensor_scale))
    x = torch.randn((rows, shape[1]), generator=generator, device=device).bfloat16()
    a = encode_operand(x, Lookup.of(books), spec, None, few or spec.array_size >= INTEGER_ARRAY)
    expected = _product(a, decode(encoded), spec)
    if few:
        return tune_decode(a, [linear], books, spec, [expected])
    return tune_prefill(a, linear, books, spec, expected)


def _product(a: Activation, weight: Tensor, spec: FormatSpec) -> Tensor:
    """What the kernels have to give, in fp64 and rounded."""
    values = a.values.double()
    if a.array_scales is not None:
        arrays = spec.num_arrays(weight.shape[1])
        values = values * a.array_scales[:, :arrays].double().repeat_interleave(spec.array_size, dim=1)
    assert a.row_scales is not None
    return ((values[:, : weight.shape[1]] * a.row_scales.double()) @ weight.double().t()).float()
