"""The product of two encoded operands, the reference that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format.encoded import Encoded, Operand, scaled_entries


def matmul(a: Operand, w: Encoded, bias: Tensor | None = None) -> Tensor:
    """`decode(a) @ decode(w).T + bias`, the tensor scales applied after the sum.

    Args:
        a: [M, K], in LO-BCQ or in int8, tensor scale [] or [M, 1].
        w: [N, K], tensor scale [].
        bias: [N] or None.

    Returns:
        fp32 [M, N]. Every term is exact, of at most 11 + 9 significant bits; the sum over K is fp32.

    Raises:
        ValueError: a and w differ in K, or w has a scale for each row.
    """
    if a.columns != w.columns:
        raise ValueError(f"a has K = {a.columns} and w has K = {w.columns}: they must agree")
    if w.tensor_scale.dim() != 0:
        raise ValueError(
            f"w has a tensor scale of shape {list(w.tensor_scale.shape)}: a weight has one for all rows, []"
        )
    return scale_product(product_in_fp32(scaled_entries(a), scaled_entries(w)), a.tensor_scale, w.tensor_scale, bias)


def product_in_fp32(a: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ w.T + bias` of fp32 tensors. Autocast does not reach it: bf16 and fp16 cannot hold the operands or sums."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.nn.functional.linear(a, w, bias)


def scale_product(product: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`(product * a_scale) * w_scale + bias`: one scale at a time, since their product may underflow."""
    out = product * a_scale * w_scale
    return out if bias is None else out + bias.float()
