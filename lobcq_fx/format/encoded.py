"""An encoded operand, and the two directions between it and floats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lobcq_fx.format.codes import CHUNK, CodeTables, assign_codes, entries_of, squared_errors, to_grid
from lobcq_fx.format.int8_activation import Int8Activation
from lobcq_fx.format.operand import check_operand, given_tensor_scale
from lobcq_fx.format.packing import pack_codes, pack_selectors, unpack_codes, unpack_selectors
from lobcq_fx.format.scales import absmax_tensor_scale, array_scales, block_arrays, neighbour_scales
from lobcq_fx.format.spec import BLOCK_SIZE, CODEBOOK_SIZE, ENTRY_MAX, FormatSpec


@dataclass(frozen=True)
class Encoded:
    """An operand [R, K] in LO-BCQ, packed as at rest (Kp = K rounded up to a multiple of L_A).

    codes: uint8 [R, Kp/2], two 4-bit codes a byte.
    selectors: uint8 [R, ceil(Kp/8 * log2(N_c) / 8)].
    scales: float8_e4m3fn [R, Kp/L_A].
    tensor_scale: fp32, [] for one scale or [R, 1] for one a row.
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

    @property
    def shape(self) -> tuple[int, int]:
        """(R, K) of the operand."""
        return self.codes.shape[0], self.columns

    def rows(self, start: int, stop: int) -> Encoded:
        """Rows start to stop, as views."""
        part = slice(start, stop)
        return replace(
            self,
            codes=self.codes[part],
            selectors=self.selectors[part],
            scales=self.scales[part],
            tensor_scale=self.tensor_scale[part] if self.tensor_scale.dim() else self.tensor_scale,
        )

    @property
    def nbytes(self) -> int:
        """Bytes stored, without the codebooks that all tensors share."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.selectors, self.scales, self.tensor_scale))


Operand = Encoded | Int8Activation
"""What a product takes as its activation."""


def encode(
    x: Tensor,
    spec: FormatSpec,
    codebooks: Tensor,
    tensor_scale: Tensor | None = None,
    *,
    search_scales: bool = False,
) -> Encoded:
    """Encode x along its last dimension.

    Args:
        x: [R, K], fp32, bf16 or fp16 (converted to fp32 first).
        spec: the configuration.
        codebooks: int8 [N_c, 16], each row sorted ascending in [-31, 31].
        tensor_scale: None for the weight rule (absmax(x) / 13888); or fp32, positive, a scalar (a static scale) or
            [R, 1] (one a row, see `absmax_row_scale`).
        search_scales: give each block array the one of some neighbouring scales that costs least (docs/format.md); for
            weights.

    Returns:
        The packed operand. Where a tensor scale is given (an activation), NaN or infinity in x marks its block array
        with a NaN scale and, with [R, 1] scales, its row with a NaN tensor scale: it decodes to NaN and disturbs no
        other row.

    Raises:
        ValueError: a wrong shape or dtype, codebooks that do not fit the spec; under the weight rule, NaN or infinity
            in x (names the first bad index).
    """
    check_operand(x)
    x = x.detach()  # what is encoded must not keep the float operand alive
    codebooks = codebooks.to(x.device)
    tables = _tables(codebooks, spec)
    tensor_scale = given_tensor_scale(x, finite_tensor_scale(x) if tensor_scale is None else tensor_scale)
    codes, selectors, scales = _encode_rows(x, spec, tables, tensor_scale, search_scales)
    return Encoded(codes, selectors, scales, tensor_scale, codebooks, spec, x.shape[1])


def decode(encoded: Operand) -> Tensor:
    """The operand's values, fp32 [R, K]: `(entry * scale) * tensor_scale`, each product rounded once."""
    return scaled_entries(encoded) * encoded.tensor_scale


def scaled_entries(encoded: Operand) -> Tensor:
    """Entry times block-array scale, fp32 [R, K]: exact, in fp16 too (9 significant bits at most, or 11 of int8)."""
    if isinstance(encoded, Int8Activation):
        return encoded.scaled_entries()
    rows, columns = encoded.shape
    values = torch.empty((rows, columns), dtype=torch.float32, device=encoded.codes.device)
    step = max(1, CHUNK // max(1, encoded.spec.padded_columns(columns)))
    for start in range(0, rows, step):
        part = encoded.rows(start, start + step)
        entries = selected_entries(part).view(*part.scales.shape, part.spec.array_size)
        scaled = entries.float() * part.scales.float().unsqueeze(-1)
        values[start : start + step] = scaled.flatten(1)[:, :columns]
    return values


def selected_entries(encoded: Encoded) -> Tensor:
    """The entries that the codes select, int8 [R, Kp]; from column K on they may be any."""
    codes = unpack_codes(encoded.codes)
    selectors = unpack_selectors(encoded.selectors, encoded.spec.selector_bits, codes.shape[1] // BLOCK_SIZE)
    return entries_of(codes, selectors, encoded.codebooks)


def check_codebooks(codebooks: Tensor, spec: FormatSpec) -> None:
    """Refuse codebooks that are not what `spec` asks for.

    Raises:
        ValueError: names the property that does not hold and the first offending codebook.
    """
    expected = (spec.num_codebooks, CODEBOOK_SIZE)
    if codebooks.dtype != torch.int8 or tuple(codebooks.shape) != expected:
        actual = f"{codebooks.dtype} {list(codebooks.shape)}"
        raise ValueError(f"codebooks are {actual}: format {spec.name} takes int8 {list(expected)}")
    wide = codebooks.to(torch.int16)
    if bool((wide.abs() > ENTRY_MAX).any()):
        row = int((wide.abs() > ENTRY_MAX).any(dim=1).nonzero()[0])
        raise ValueError(f"codebook {row} has an entry outside [-{ENTRY_MAX}, {ENTRY_MAX}]: {codebooks[row].tolist()}")
    descending = (wide.diff(dim=1) < 0).any(dim=1)
    if bool(descending.any()):
        row = int(descending.nonzero()[0])
        raise ValueError(f"codebook {row} is not sorted ascending: {codebooks[row].tolist()}")


def _tables(codebooks: Tensor, spec: FormatSpec) -> CodeTables:
    """Checked look-up tables of a codebook set, made once: an activation is encoded at every layer and token."""
    shape = tuple(codebooks.shape)
    return _cached_tables(tuple(codebooks.flatten().tolist()), shape, codebooks.dtype, codebooks.device, spec)


@lru_cache(maxsize=32)
def _cached_tables(
    entries: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, spec: FormatSpec
) -> CodeTables:
    codebooks = torch.tensor(entries, dtype=dtype, device=device).view(shape)
    check_codebooks(codebooks, spec)
    return CodeTables.of(codebooks)


def _encode_rows(
    x: Tensor, spec: FormatSpec, tables: CodeTables, tensor_scale: Tensor, search_scales: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode a chunk of rows at a time into preallocated outputs, so that working memory does not grow with R."""
    rows, columns = x.shape
    codes = torch.empty((rows, spec.code_bytes(columns)), dtype=torch.uint8, device=x.device)
    selectors = torch.empty((rows, spec.selector_bytes(columns)), dtype=torch.uint8, device=x.device)
    scales = torch.empty((rows, spec.num_arrays(columns)), dtype=torch.float8_e4m3fn, device=x.device)
    if rows == 0 or columns == 0:
        return codes, selectors, scales
    step = max(1, CHUNK // spec.padded_columns(columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        arrays = block_arrays(x[part], spec)
        scale = tensor_scale[part] if tensor_scale.dim() else tensor_scale
        scales[part] = array_scales(arrays, scale)
        if search_scales:
            scales[part] = _cheapest_scales(arrays, scales[part], scale, tables)
        grid = to_grid(arrays, scales[part], scale).flatten(1)
        part_codes, part_selectors = assign_codes(grid, tables)
        codes[part] = pack_codes(part_codes)
        selectors[part] = pack_selectors(part_selectors, spec.selector_bits)
    return codes, selectors, scales


def _cheapest_scales(arrays: Tensor, scales: Tensor, tensor_scale: Tensor, tables: CodeTables) -> Tensor:
    """Of the neighbours of scales [R, G], those with the least error, the first of equal ones. Exact in fp64."""
    tried, costs = neighbour_scales(scales), []
    for one in tried:
        errors = squared_errors(to_grid(arrays, one, tensor_scale).flatten(1), tables).view(arrays.shape)
        costs.append(errors.sum(-1).double() * one.double().square())
    best = torch.stack(costs).argmin(0, keepdim=True)
    return torch.stack([one.view(torch.uint8) for one in tried]).gather(0, best)[0].view(torch.float8_e4m3fn)


def finite_tensor_scale(x: Tensor) -> Tensor:
    """The weight rule's scale of x, fp32 [].

    Raises:
        ValueError: NaN or infinity in x.
    """
    scale = absmax_tensor_scale(x)
    if bool(scale.isnan()):
        bad = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise ValueError(f"x[{bad[0]}, {bad[1]}] is {x[tuple(bad)].item()}: a weight must be finite")
    return scale
