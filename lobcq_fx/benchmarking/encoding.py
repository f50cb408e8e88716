"""How fast the core encodes activations and weights and repacks weights, by itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch

from lobcq_fx.benchmarking.ours import require_core
from lobcq_fx.benchmarking.race import race
from lobcq_fx.calibration.synthetic import synthetic
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.kernels.cpu.installed import tables_of

SHAPE = (512, 4096)
"""An activation of 512 tokens, and as many rows of a weight: fp32, 8 MiB."""


def encoding_rates(formats: Sequence[FormatSpec], rounds: int) -> dict[str, dict[str, float]]:
    """By format, for each of torch's threads.

    Returns:
        "activation_ns_per_scalar": nanoseconds, from fp32 to what a W4A4 linear reads, tensor scales computed.
        "weight_scalars_per_second": from fp32 to the bytes that are stored, tensor scale computed.
        "repack_scalars_per_second": from these to the kernel layout.
    """
    core, threads = require_core(), torch.get_num_threads()
    x = synthetic("gaussian", SHAPE, seed=0)
    rates = {}
    for spec in formats:
        codebooks = universal_codebooks(spec.num_codebooks)
        tables = tables_of(codebooks)
        stored = core.encode(tables, x, spec.array_size, core.tensor_scale(x))
        times = race(
            {
                "activation": [partial(core.encode_activation, tables, x, spec.array_size)],
                "weight": [partial(torch.ops.lobcq.quantize_weight, x, codebooks, spec.array_size)],
                "repack": [partial(core.pack_weight, stored)],
            },
            rounds,
        )
        activation, weight, repack = (
            statistics.median(times[name]) * threads / x.numel() for name in ("activation", "weight", "repack")
        )
        rates[spec.name] = {
            "activation_ns_per_scalar": activation * 1e9,
            "weight_scalars_per_second": 1 / weight,
            "repack_scalars_per_second": 1 / repack,
        }
    return rates
