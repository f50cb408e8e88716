"""Stacked weights [E, N, K]: E matrices, each an operand of its own, that meet groups of an activation's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.format.encoded import Encoded, Operand, decode, encode, scaled_entries
from lobcq_fx.format.matmul import product_in_fp32, scale_product
from lobcq_fx.format.spec import FormatSpec


@dataclass(frozen=True)
class EncodedStack:
    """A stack of weights [E, N, K] in LO-BCQ, packed as at rest: the parts of `Encoded`, each of all E matrices.

    codes: uint8 [E, N, Kp/2].
    selectors: uint8 [E, N, ceil(Kp/8 * log2(N_c) / 8)].
    scales: float8_e4m3fn [E, N, Kp/L_A].
    tensor_scale: fp32 [E].
    codebooks: int8 [N_c, 16].
    columns: K.
    """

    codes: Tensor
    selectors: Tensor
    scales: Tensor
    tensor_scale: Tensor
    codebooks: Tensor
    spec: FormatSpec
    columns: int

    @classmethod
    def of(cls, matrices: Sequence[Encoded]) -> EncodedStack:
        """Matrices of one shape and format, at least one, on one device."""
        first = matrices[0]
        # torch stacks no E4M3: its bytes are.
        codes, selectors, scales = (
            torch.stack([getattr(one, part).view(torch.uint8) for one in matrices])
            for part in ("codes", "selectors", "scales")
        )
        tensor_scale = torch.stack([one.tensor_scale for one in matrices])
        scales = scales.view(torch.float8_e4m3fn)
        return cls(codes, selectors, scales, tensor_scale, first.codebooks, first.spec, first.columns)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        return self.codes.shape[0], self.codes.shape[1], self.columns

    @property
    def nbytes(self) -> int:
        """Bytes stored, without the codebooks that all tensors share."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.selectors, self.scales, self.tensor_scale))

    def matrix(self, index: int) -> Encoded:
        """One of the matrices, as views."""
        codes, selectors, scales = self.codes[index], self.selectors[index], self.scales[index]
        return Encoded(codes, selectors, scales, self.tensor_scale[index], self.codebooks, self.spec, self.columns)


def encode_stack(x: Tensor, spec: FormatSpec, codebooks: Tensor, *, search_scales: bool = False) -> EncodedStack:
    """Encode each matrix of x [E, N, K], E at least 1, by the weight rule: `encode`, E times.

    Raises:
        ValueError: as `encode`, with the matrix that it is about.
    """
    if x.dim() != 3 or x.shape[0] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: pass a stack [E, N, K] of at least one matrix")
    matrices = []
    for index, matrix in enumerate(x):
        try:
            matrices.append(encode(matrix, spec, codebooks, search_scales=search_scales))
        except ValueError as error:
            raise ValueError(f"matrix {index}: {error}") from None
    return EncodedStack.of(matrices)


def decode_stack(stack: EncodedStack) -> Tensor:
    """The values of all matrices, fp32 [E, N, K]."""
    return torch.stack([decode(stack.matrix(index)) for index in range(stack.shape[0])])


def group_bounds(ends: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """First row, and the row behind the last, of each group of an activation with `rows` rows.

    ends: where groups end, one for each. Any numbers give groups: an end beyond the rows is their end, one before the
        end of the group before makes an empty group.
    """
    bounds, start = [], 0
    for end in ends:
        stop = min(max(end, start), rows)
        bounds.append((start, stop))
        start = stop
    return bounds


def grouped_matmul(a: Operand, w: EncodedStack, ends: Sequence[int]) -> Tensor:
    """The product of each group of rows with its matrix: `matmul`, group by group.

    Args:
        a: [M, K], in LO-BCQ or in int8, tensor scale [] or [M, 1].
        w: [E, N, K].
        ends: where the E groups end, see `group_bounds`.

    Returns:
        fp32 [M, N]; zeros in the rows of no group.

    Raises:
        ValueError: a and w differ in K, or there are not E ends.
    """
    if a.columns != w.columns:
        raise ValueError(f"a has K = {a.columns} and w has K = {w.columns}: they must agree")
    if len(ends) != w.shape[0]:
        raise ValueError(f"{len(ends)} ends of groups for {w.shape[0]} matrices: they must agree")
    entries = scaled_entries(a)
    rows = entries.shape[0]
    tensor_scale = a.tensor_scale.expand(rows, 1)

    def product(index: int, group: slice) -> Tensor:
        matrix = w.matrix(index)
        out = product_in_fp32(entries[group], scaled_entries(matrix))
        return scale_product(out, tensor_scale[group], matrix.tensor_scale, None)

    return by_groups(group_bounds(ends, rows), entries, w.shape[1], product)


def by_groups(
    bounds: Sequence[tuple[int, int]], a: Tensor, outputs: int, product: Callable[[int, slice], Tensor]
) -> Tensor:
    """Products of groups of rows, put together.

    Args:
        bounds: of the groups, from `group_bounds`.
        a: [M, K], what the groups are rows of.
        outputs: N.
        product: called with a group's number and its rows, where it has any; returns fp32 [rows, N].

    Returns:
        fp32 [M, N]; zeros in the rows of no group.
    """
    out = torch.zeros((a.shape[0], outputs), dtype=torch.float32, device=a.device)
    for index, (start, stop) in enumerate(bounds):
        if stop > start:
            out[start:stop] = product(index, slice(start, stop))
    return out
