"""Encoding on a GPU: alone against a copy of its input, and with a norm or a gate before it against that norm alone.

The encoders with something before them are compared inside a linear of 16 outputs, which costs next to nothing beside
them; the linear without its encoder is timed by itself and can be subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.linears import check, encoded_weight, in_kernel_layout
from benchmarks.gpu.timing import race, summary
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.ops.prologues import rms_norm, silu_mul

COPY, NORM, SILU = "copy", "RMSNorm", "silu(gate) * up"
OUTPUTS = 16
EPS = 1e-5


def measure_encoders(shape: tuple[int, int], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """bf16 [M, K]: three races, each with the time it is compared with."""
    spec = FormatSpec()
    books = universal_codebooks(spec.num_codebooks).to(device)
    generator = torch.Generator(device).manual_seed(0)
    x, other = (torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(2))
    weight = torch.rand(shape[1], generator=generator, device=device).bfloat16()
    copied, encode = torch.empty_like(x), _encoder(x, books, spec)
    op, rest = torch.ops.lobcq.linear_prepacked, _linear(spec, shape[1], device)
    none = torch.empty(0, device=device)
    plain = partial(op.default, x, *rest, x.dtype)
    normed = partial(op.rms_norm, x, weight, EPS, 0.0, True, *rest, x.dtype)
    gated = partial(op.silu_mul, x, other, *rest, [none], x.dtype)
    check("RMSNorm + encode", normed()[0], op.default(rms_norm(x, weight, EPS), *rest, x.dtype)[0], 0.01)
    check("silu + encode", gated()[0], op.default(silu_mul(x, other), *rest, x.dtype)[0], 0.01)
    races = [
        (COPY, {COPY: lambda: copied.copy_(x), "encode": encode}),
        (NORM, {NORM: partial(_norm, x, weight), "encode + linear": plain, "RMSNorm + encode + linear": normed}),
        (SILU, {SILU: partial(_gate, x, other), "encode + linear": plain, f"{SILU} + encode + linear": gated}),
    ]
    return [
        {
            "shape": list(shape),
            "times": summary(race({name: [call] for name, call in calls.items()}, rounds, device), base),
        }
        for base, calls in races
    ]


def _encoder(x: Tensor, books: Tensor, spec: FormatSpec) -> Callable[[], Any]:
    """The encoder by itself: on a GPU without the op around it, which looks tables up by the codebooks' values."""
    if x.device.type == "cpu":
        return partial(torch.ops.lobcq.quantize_activation, x, books, spec.array_size)
    from lobcq_fx.kernels.triton.encode import encode_rows  # imports triton
    from lobcq_fx.kernels.triton.lookup import Lookup

    return partial(encode_rows, x, Lookup.of(books), spec)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, (x.shape[-1],), weight, EPS)


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def _linear(spec: FormatSpec, columns: int, device: torch.device) -> tuple[Any, ...]:
    """The arguments of a linear of few outputs, from its activation's tables on."""
    weight = torch.randn((OUTPUTS, columns), generator=torch.Generator(device).manual_seed(1), device=device)
    encoded = encoded_weight(weight, spec)
    packed, tables = in_kernel_layout(encoded)
    none = torch.empty(0, device=device)
    return tables, None, [packed], [encoded.tensor_scale], tables, [none], [OUTPUTS], spec.array_size
