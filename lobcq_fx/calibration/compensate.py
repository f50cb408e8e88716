"""Encode a weight so that what rounding does to one column is made up for by the columns rounded after it.

This is GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323) inside the format. The rounding of a row w to v costs
(w - v) H (w - v)^T in the layer's output, H being the second moments of its input. Columns are rounded one after the
other; each error, times a row of the Cholesky factor of H^-1, is taken from the columns to come. What the format adds:

- A block array gets its scale when its first column is due: the one of some neighbours that costs least.
- A block's eight columns are rounded with every codebook, each with the feedback of its own errors; the codebook whose
  errors cost least wins, and only its errors go on.
- Whole block arrays are taken in the order of their inputs' power: the first errors find the most columns to come.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lobcq_fx.errors import CalibrationError
from lobcq_fx.format import Encoded, FormatSpec, block_arrays
from lobcq_fx.format.codes import CodeTables
from lobcq_fx.format.encoded import finite_tensor_scale
from lobcq_fx.format.packing import pack_codes, pack_selectors
from lobcq_fx.format.scales import array_scales
from lobcq_fx.format.spec import BLOCK_SIZE, GRID, GRID_MAX

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: columns that always move together would take each other's errors whole."""

SCALE_STEPS = (0, -1, -2, 1)
"""E4M3 neighbours of the scale that the array's largest magnitude asks for; of equal costs, the first."""

LARGEST_SCALE_BYTE = 0x7E


def compensate(weight: Tensor, second_moments: Tensor, spec: FormatSpec, codebooks: Tensor) -> Encoded:
    """Encode a weight with feedback of its rounding errors.

    Args:
        weight: [N, K], any float dtype.
        second_moments: fp32 [K, K], sums or means of x^T x over the rows x of the layer's inputs. Columns that no input
            reached, and singular matrices, are taken as they are: their errors cost nothing that anybody has seen, so
            that such columns are rounded to the nearest.
        spec: the format.
        codebooks: int8 [N_c, 16], each row sorted ascending.

    Returns:
        The encoding, under the weight's own tensor scale (absmax / 13888).

    Raises:
        CalibrationError: the second moments hold NaN or infinity.
        ValueError: the weight does (names the first bad index), or has no scalars.
    """
    if not bool(torch.isfinite(second_moments).all()):
        raise CalibrationError("the second moments of the layer's inputs hold NaN or infinity")
    rows, columns = weight.shape
    tensor_scale = finite_tensor_scale(weight)
    arrays = block_arrays(weight, spec)  # fp32 [N, G, L_A], padded with zeros
    if not arrays.numel():
        raise ValueError(f"weight has shape {list(weight.shape)}: there is nothing to encode")
    order, factor = _order_and_factor(second_moments.to(arrays), columns, spec)
    rest = arrays[:, order].flatten(1)
    result = _Result.empty(rows, arrays.shape[1], spec, weight.device)
    rounding = _Rounding(codebooks.to(weight.device))
    for place, array in enumerate(order.tolist()):
        begin, end = place * spec.array_size, (place + 1) * spec.array_size
        real = (
            array * spec.array_size + torch.arange(spec.array_size, dtype=torch.long, device=weight.device) < columns
        ).float()
        part = factor[begin:end, begin:end]
        errors = rounding.round_array(rest[:, begin:end], part, real, tensor_scale, result.of(array))
        rest[:, end:] -= errors @ factor[begin:end, end:]
    return Encoded(
        pack_codes(result.codes.flatten(1)),
        pack_selectors(result.selectors.flatten(1), spec.selector_bits),
        result.scales,
        tensor_scale,
        codebooks,
        spec,
        columns,
    )


def _order_and_factor(moments: Tensor, columns: int, spec: FormatSpec) -> tuple[Tensor, Tensor]:
    """Block arrays in the order in which they are rounded, and the upper Cholesky factor of H^-1 in that order."""
    power = moments.diagonal()
    usual = power.mean() if bool((power > 0).any()) else power.new_ones(())
    padded = spec.padded_columns(columns)
    hessian = torch.zeros(padded, padded, dtype=torch.float32, device=moments.device)
    hessian[:columns, :columns] = moments
    diagonal = hessian.diagonal()
    unseen = diagonal <= 0  # padding, and columns that were 0 in every input
    hessian[unseen], hessian[:, unseen] = 0, 0
    diagonal[unseen] = usual
    order = torch.where(unseen, 0.0, diagonal).view(-1, spec.array_size).sum(1).argsort(descending=True, stable=True)
    places = (
        order[:, None] * spec.array_size + torch.arange(spec.array_size, dtype=torch.long, device=order.device)
    ).flatten()
    hessian = hessian[places][:, places]
    damping = DAMPING
    while True:
        damped = hessian + torch.eye(padded, dtype=torch.float32, device=hessian.device) * (damping * usual)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return order, factor
        damping *= 10  # fp32 did not suffice: at the latest when the identity outweighs the rest, it does


@dataclass(frozen=True)
class _Result:
    """codes uint8 [N, G, L_A], selectors uint8 [N, G, L_A / 8], scales float8_e4m3fn [N, G]; `of` gives views."""

    codes: Tensor
    selectors: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, rows: int, arrays: int, spec: FormatSpec, device: torch.device) -> _Result:
        codes = torch.empty(rows, arrays, spec.array_size, dtype=torch.uint8, device=device)
        selectors = torch.empty(rows, arrays, spec.array_size // BLOCK_SIZE, dtype=torch.uint8, device=device)
        return cls(codes, selectors, torch.empty(rows, arrays, dtype=torch.float8_e4m3fn, device=device))

    def of(self, array: int) -> _Result:
        """One block array of every row."""
        return _Result(self.codes[:, array], self.selectors[:, array], self.scales[:, array])


class _Rounding:
    """Rounds the columns of one block array; what it looks up is made once.

    nearest: uint8 [4095, N_c], the index of the nearest entry; entries: fp32 [4095, N_c], that entry.
    """

    def __init__(self, codebooks: Tensor) -> None:
        self.nearest = CodeTables.of(codebooks).nearest
        self.entries = codebooks.float().t().gather(0, self.nearest.long())

    def round_array(
        self, values: Tensor, factor: Tensor, real: Tensor, tensor_scale: Tensor, result: _Result
    ) -> Tensor:
        """Round values [N, L_A] in place of what they were, and return the errors [N, L_A] over the factor's diagonal.

        Args:
            values: what the columns are by now; changed.
            factor: their part of the Cholesky factor, [L_A, L_A].
            real: 1.0 for each column that is no padding.
            tensor_scale: of the weight.
            result: gets the codes, selectors and scales.
        """
        cost = real / factor.diagonal() ** 2
        scales = self._cheapest_scales(values, cost, tensor_scale)
        result.scales.copy_(scales)
        scale = scales.float() * tensor_scale
        errors = torch.empty_like(values)
        for begin in range(0, values.shape[1], BLOCK_SIZE):
            block = slice(begin, begin + BLOCK_SIZE)
            codes, selectors, errors[:, block] = self._round_block(
                values[:, block], factor[block, block], real[block], scale
            )
            result.codes[:, block], result.selectors[:, begin // BLOCK_SIZE] = codes, selectors
            values[:, begin + BLOCK_SIZE :] -= errors[:, block] @ factor[block, begin + BLOCK_SIZE :]
        return errors

    def _round_block(
        self, values: Tensor, factor: Tensor, real: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [N, 8], selectors [N] and errors [N, 8] of the codebook whose errors cost least."""
        count = self.nearest.shape[1]
        tried = values.unsqueeze(1).repeat(1, count, 1)  # [N, N_c, 8]
        errors, codes = torch.empty_like(tried), torch.empty_like(tried, dtype=torch.uint8)
        for column in range(BLOCK_SIZE):
            places = self._places(tried[:, :, column], scale.unsqueeze(1))
            codes[:, :, column] = self.nearest.flatten().take(places)
            rounded = self.entries.flatten().take(places) * scale.unsqueeze(1)
            errors[:, :, column] = (tried[:, :, column] - rounded) / factor[column, column]
            tried[:, :, column + 1 :] -= errors[:, :, column, None] * factor[column, column + 1 :]
        selectors = (errors.square() @ real).argmin(1)
        chosen = selectors[:, None, None].expand(-1, 1, BLOCK_SIZE)
        return codes.gather(1, chosen)[:, 0], selectors.to(torch.uint8), errors.gather(1, chosen)[:, 0]

    def _cheapest_scales(self, values: Tensor, cost: Tensor, tensor_scale: Tensor) -> Tensor:
        """Of each row's array, float8_e4m3fn [N]: the cheapest if every column were rounded by itself."""
        first = array_scales(values.unsqueeze(1), tensor_scale)[:, 0].view(torch.uint8).int()
        found: list[Tensor] = []
        prices: list[Tensor] = []
        for step in SCALE_STEPS:
            byte = torch.where(first > 0, (first + step).clamp(1, LARGEST_SCALE_BYTE), first)
            scales = byte.to(torch.uint8).view(torch.float8_e4m3fn)
            scale = (scales.float() * tensor_scale)[:, None, None]
            rounded = self.entries.flatten().take(self._places(values.unsqueeze(-1), scale)) * scale  # [N, L_A, N_c]
            price = (values.unsqueeze(-1) - rounded).square() * cost[:, None]
            blocks = price.view(len(values), -1, BLOCK_SIZE, price.shape[-1]).sum(2)
            found.append(byte)
            prices.append(blocks.amin(-1).sum(-1))
        best = torch.stack(prices).argmin(0, keepdim=True)
        return torch.stack(found).gather(0, best)[0].to(torch.uint8).view(torch.float8_e4m3fn)

    def _places(self, values: Tensor, scale: Tensor) -> Tensor:
        """Where the tables have values [N, ..., N_c or 1] on the grid of their scale, one column for each codebook."""
        count = self.nearest.shape[1]
        grid = torch.where(scale > 0, values / scale, 0.0) * GRID
        rows = grid.round().clamp(-GRID_MAX, GRID_MAX).long() + GRID_MAX
        return rows * count + torch.arange(count, dtype=torch.long, device=rows.device)
