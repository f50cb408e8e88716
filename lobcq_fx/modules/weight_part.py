"""Packed products of which each of several processes has a part: some rows of the weight, or some of its columns.

Rows divide the result, and need nothing more. Columns divide what is read, and the results of all processes are to be
added; but an activation without a calibrated scale is encoded by the largest magnitude of its whole row, of which each
process sees a part. So the processes tell each other, and each writes that magnitude into one more block array at the
end of its part, where its weight has zeros: kernels find it there as they find any other, and the part gets the codes
and scales that it has in the whole row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from lobcq_fx.format import FormatSpec
from lobcq_fx.modules.packed_weight import PARTS

WHOLE_BYTES = 64
"""Scalars whose selectors take whole bytes, whatever their number of bits."""


def smallest_part(spec: FormatSpec) -> int:
    """Columns that a part must be a multiple of, so that it has whole block arrays and whole bytes of selectors."""
    return max(spec.array_size, WHOLE_BYTES)


@dataclass(frozen=True)
class WholeRows:
    """Rows of an activation whose columns are divided among the processes of a group.

    array_size: L_A of the weight.
    """

    group: torch.distributed.ProcessGroup
    array_size: int

    def largest_beside(self, x: Tensor) -> Tensor:
        """x [..., K / n] and one block array of the largest magnitude of the whole row: [..., K / n + L_A], as x.

        A maximum may lose a NaN that another process has. That process's part of the result is NaN by itself.
        """
        largest = x.abs().amax(-1, keepdim=True).float()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self.group)
        return torch.cat([x, largest.to(x.dtype).expand(*x.shape[:-1], self.array_size)], dim=-1)


def with_zero_array(parts: Mapping[str, Tensor], spec: FormatSpec, columns: int) -> dict[str, Tensor]:
    """A weight's parts, by their names in `PARTS`, with one more block array of zeros in each row.

    columns: how many it has, a multiple of `smallest_part`.
    """
    more = columns + spec.array_size
    widths = (spec.code_bytes(more), spec.selector_bytes(more), spec.num_arrays(more))
    wider = {}
    for name, width in zip(PARTS, widths, strict=False):  # all but the tensor scale
        tensor = parts[name]
        zeros = torch.zeros((*tensor.shape[:-1], width - tensor.shape[-1]), dtype=torch.uint8, device=tensor.device)
        # torch joins no E4M3: its bytes are.
        wider[name] = torch.cat([tensor.view(torch.uint8), zeros], dim=-1).view(tensor.dtype)
    return {**parts, **wider}
