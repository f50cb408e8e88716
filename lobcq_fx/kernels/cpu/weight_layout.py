"""The layout in which the C++ core wants weights, for passes that prepack them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.cpu.installed import cpu_core, tables_of
from lobcq_fx.kernels.cpu.library import Core
from lobcq_fx.kernels.cpu.operands import KernelWeight, PackedOperand

Parts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class CpuWeightLayout:
    """Codes, selectors and scales to the core's layout and back, no larger but for padding to 16 rows and 64 columns.

    It holds no state: models that carry it can be copied and pickled.
    """

    stacks: ClassVar[bool] = True

    def pack(self, parts: Parts, spec: FormatSpec, columns: int) -> Tensor:
        """The weight [N, columns] in kernel layout, uint8 [bytes].

        Raises:
            CoreError: bytes that no encoder writes.
        """
        codes, selectors, scales = (part.contiguous() for part in parts)
        unscaled = torch.ones((), dtype=torch.float32, device="cpu")
        stored = PackedOperand(codes, selectors, scales.view(torch.uint8), unscaled, spec, columns)
        return _core().pack_weight(stored).data

    def unpack(self, prepacked: Tensor, spec: FormatSpec, rows: int, columns: int) -> Parts:
        """Inverse of `pack`."""
        stored = _core().unpack_weight(KernelWeight(prepacked, rows, columns, spec, tensor_scale=1.0))
        return stored.codes, stored.selectors, stored.scales.view(torch.float8_e4m3fn)

    def tables(self, codebooks: Tensor) -> Tensor:
        """What the core looks up for codebooks int8 [N_c, 16], uint8 [bytes]."""
        return tables_of(codebooks).data


def _core() -> Core:
    core = cpu_core()
    assert core is not None, "a layout without a core"
    return core
