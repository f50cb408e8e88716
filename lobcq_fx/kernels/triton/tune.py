"""Timing launch configurations on a GPU. No GPU has run this yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from lobcq_fx.errors import LobcqError
from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.triton.configs import (
    DecodeConfig,
    PrefillConfig,
    Shape,
    decode_candidates,
    prefill_candidates,
)
from lobcq_fx.kernels.triton.decode_gemm import decode_gemm
from lobcq_fx.kernels.triton.operands import Activation, Linear
from lobcq_fx.kernels.triton.prefill_gemm import prefill_gemm

Config = TypeVar("Config", DecodeConfig, PrefillConfig)
Timer = Callable[[Callable[[], object]], float]

TOLERANCE = 1e-5
"""Of the largest result: candidates add in other orders, in fp32."""


def fastest(
    run: Callable[[Config], Sequence[Tensor]],
    candidates: Iterable[Config],
    expected: Sequence[Tensor],
    timer: Timer = do_bench,
) -> tuple[Config, float]:
    """The fastest candidate, and its time as `timer` says it: milliseconds by `triton.testing.do_bench`.

    Args:
        run: gives results in fp32 with a configuration.
        candidates: those that need more shared memory or registers than there are do not count.
        expected: what each has to give, whatever it takes.
        timer: of a call.

    Raises:
        LobcqError: a candidate gives something else (says which), or none can run.
    """
    times: list[tuple[Config, float]] = []
    for config in candidates:
        try:
            found = run(config)
        except OutOfResources:
            continue
        for one, other in zip(found, expected, strict=True):
            off = (one.double() - other.double()).abs().max()
            if not bool(off <= TOLERANCE * other.double().abs().max()):
                raise LobcqError(f"{config} is off by {off.item():.3g}: no time is worth that")
        times.append((config, timer(partial(run, config))))
    if not times:
        raise LobcqError("no candidate can run on this GPU")
    return min(times, key=lambda pair: pair[1])


def tune_decode(
    a: Activation, linears: Sequence[Linear], codebooks: Tensor, spec: FormatSpec, expected: Sequence[Tensor]
) -> tuple[str, DecodeConfig, float]:
    """For up to four linears in one launch: the key in a GPU's file, the fastest configuration and its milliseconds."""
    shape = Shape.of(a.values, sum(linear.outputs for linear in linears), spec)

    def run(config: DecodeConfig) -> list[Tensor]:
        return decode_gemm(a, linears, codebooks, spec, torch.float32, config)

    return (shape.key, *fastest(run, decode_candidates(shape), expected))


def tune_prefill(
    a: Activation, linear: Linear, codebooks: Tensor, spec: FormatSpec, expected: Tensor
) -> tuple[str, PrefillConfig, float]:
    """As `tune_decode`, of one linear and more rows."""
    shape = Shape.of(a.values, linear.outputs, spec)

    def run(config: PrefillConfig) -> list[Tensor]:
        return prefill_gemm(a, [linear], codebooks, spec, torch.float32, config)

    return (shape.key, *fastest(run, prefill_candidates(shape), [expected]))
