"""`lobcq::linear_prepacked` with what comes before the encoder, or after the product, in the same op.

.residual, .float_activation_residual   linears, and a tensor added to each result
.silu_mul                               of silu(gate) * up; also with residuals
.rms_norm, .layer_norm                  of a norm
.add_rms_norm                           of a norm of a sum, which is a result too

The default implementations compute the one by `prologues`, and call the op that is not fused for the other. A device
that fuses them encodes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.ops import schemas
from lobcq_fx.ops.contracts import OPERANDS
from lobcq_fx.ops.linear_prepacked import results_like
from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.prologues import layer_norm, rms_norm, silu_mul

ops = torch.ops.lobcq


def linear_residual(
    x: Tensor,
    activation_tables: Tensor | None,
    static_scale: Tensor | None,
    weights: list[Tensor],
    tensor_scales: list[Tensor],
    weight_tables: Tensor,
    biases: list[Tensor],
    out_features: list[int],
    array_size: int,
    residuals: list[Tensor],
    dtype: torch.dtype,
    rotated: bool = False,
) -> list[Tensor]:
    """`x @ w.T + bias`, rounded, `+ residual`, rounded again: arguments as `lobcq::linear_prepacked`, and

    Args:
        residuals: for each weight [..., N_i] in `dtype`, or [0] for none.
    """
    rest = (weights, tensor_scales, weight_tables, biases, out_features, array_size)
    results = ops.linear_prepacked.default(x, activation_tables, static_scale, *rest, dtype, rotated)
    return _added(results, residuals)


def linear_float_activation_residual(
    x: Tensor,
    weights: list[Tensor],
    tensor_scales: list[Tensor],
    weight_tables: Tensor,
    biases: list[Tensor],
    out_features: list[int],
    array_size: int,
    residuals: list[Tensor],
) -> list[Tensor]:
    """The same with the float values of x (W4A16)."""
    rest = (weights, tensor_scales, weight_tables, biases, out_features, array_size)
    return _added(ops.linear_prepacked.float_activation(x, *rest), residuals)


def silu_mul_linear(gate: Tensor, up: Tensor, *rest: object) -> list[Tensor]:
    """Linears, with residuals, of `prologues.silu_mul(gate, up)`, both [..., K]."""
    return linear_residual(silu_mul(gate, up), *rest)  # type: ignore[arg-type]


def rms_norm_linear(
    x: Tensor, norm_weight: Tensor | None, eps: float, offset: float, round_first: bool, *rest: object
) -> list[Tensor]:
    """Linears of `prologues.rms_norm(x, ...)`."""
    results: list[Tensor] = ops.linear_prepacked.default(rms_norm(x, norm_weight, eps, offset, round_first), *rest)
    return results


def add_rms_norm_linear(x: Tensor, residual: Tensor, *rest: object) -> list[Tensor]:
    """`x + residual`, and linears of its norm: first the sum [..., K], then their results."""
    total = (x + residual).contiguous()
    return [total, *rms_norm_linear(total, *rest)]  # type: ignore[arg-type]


def layer_norm_linear(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, *rest: object
) -> list[Tensor]:
    """Linears of `prologues.layer_norm(x, ...)`."""
    results: list[Tensor] = ops.linear_prepacked.default(layer_norm(x, norm_weight, norm_bias, eps), *rest)
    return results


def _added(results: list[Tensor], residuals: list[Tensor]) -> list[Tensor]:
    return [out + more if more.numel() else out for out, more in zip(results, residuals, strict=True)]


IMPLEMENTATIONS: dict[str, Callable[..., list[Tensor]]] = {
    schemas.LINEAR_PREPACKED_RESIDUAL: linear_residual,
    schemas.LINEAR_PREPACKED_FLOAT_ACTIVATION_RESIDUAL: linear_float_activation_residual,
    schemas.LINEAR_PREPACKED_SILU_MUL: silu_mul_linear,
    schemas.LINEAR_PREPACKED_RMS_NORM: rms_norm_linear,
    schemas.LINEAR_PREPACKED_ADD_RMS_NORM: add_rms_norm_linear,
    schemas.LINEAR_PREPACKED_LAYER_NORM: layer_norm_linear,
}


def _checked(name: str, implementation: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Checks what the op adds to the one that is not fused, which checks the rest."""
    names = schemas.argument_names(name)
    own = {*names} - {operand.name for operand in OPERANDS[schemas.LINEAR_PREPACKED]} | {"x"}

    @wraps(implementation)
    def run(*arguments: Any) -> list[Tensor]:
        check(name, {key: value for key, value in zip(names, arguments, strict=False) if key in own})
        return implementation(*arguments)

    return run


def _fake_of(name: str) -> Callable[..., list[Tensor]]:
    """The fake kernel of any of these ops: what it returns follows from arguments that all of them have."""
    names = schemas.argument_names(name)

    def fake(*arguments: Any) -> list[Tensor]:
        given = dict(zip(names, arguments, strict=False))  # those left to their defaults are absent
        check_fake(name, given)
        x = given["gate"] if "gate" in given else given["x"]
        results = results_like(x, given["out_features"], given.get("dtype", x.dtype))
        return [x.new_empty(x.shape), *results] if "residual" in given else results

    return fake


for _name, _implementation in IMPLEMENTATIONS.items():
    torch.library.impl(_name, "CompositeExplicitAutograd", _checked(_name, _implementation))
    torch.library.register_fake(_name, _fake_of(_name))
