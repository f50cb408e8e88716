"""Our linear as models run it: `lobcq::linear_prepacked` on one weight, the activation's encoding included."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import lobcq_fx.ops  # noqa: F401  (defines the ops)
from lobcq_fx.benchmarking.contender import Call, Contender
from lobcq_fx.errors import LobcqError
from lobcq_fx.format import Encoded, FormatSpec, absmax_row_scale, decode, encode, encode_int8, universal_codebooks
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.kernels.cpu.installed import SWITCH, cpu_core
from lobcq_fx.kernels.cpu.library import Core

EXACT = 1e-5
"""Relative error in norm: fp32 rounding of a product of decoded operands."""

ops = torch.ops.lobcq


class NoCoreError(LobcqError):
    """There is no C++ core to measure."""


def require_core() -> Core:
    """The C++ core, bound to the ops.

    Raises:
        NoCoreError: it was not built or is switched off.
    """
    core = cpu_core()
    if core is None or weight_layout(torch.device("cpu")) is None:
        raise NoCoreError(
            "there is no C++ core to measure, the ops run through plain torch: install a C++ compiler and reinstall"
            f" lobcq-fx, and unset {SWITCH} if it is 0"
        )
    return core


@dataclass(frozen=True)
class OurLinear:
    """A weight [N, K] encoded with the universal codebooks, and the product it should give."""

    weight: Encoded
    mode: str

    @classmethod
    def of(cls, weight: Tensor, spec: FormatSpec, mode: str) -> OurLinear:
        """Encode a weight, fp32 [N, K]; mode is "w4a4", "w4a8" or "w4a16"."""
        require_core()
        codebooks = universal_codebooks(spec.num_codebooks)
        codes, selectors, scales, tensor_scale = ops.quantize_weight(weight, codebooks, spec.array_size)
        return cls(Encoded(codes, selectors, scales, tensor_scale, codebooks, spec, weight.shape[1]), mode)

    def expected(self, x: Tensor) -> Tensor:
        """By `lobcq_fx.format`: the product of the decoded operands, fp64 [M, N]."""
        if self.mode == "w4a8":
            x = decode(encode_int8(x, self.weight.spec.array_size))
        elif self.mode == "w4a4":
            x = decode(encode(x, self.weight.spec, self.weight.codebooks, absmax_row_scale(x)))
        return x.double() @ self._decoded.double().t()

    @cached_property
    def _decoded(self) -> Tensor:
        return decode(self.weight)

    def contender(self) -> Contender:
        """The op on the weight in the core's layout."""
        layout = weight_layout(torch.device("cpu"))
        assert layout is not None, "encoded without a core"
        w = self.weight
        packed = layout.pack((w.codes, w.selectors, w.scales), w.spec, w.columns)
        tables, no_bias, array_size = (
            layout.tables(w.codebooks),
            torch.empty(0, dtype=torch.float32, device=w.codes.device),
            w.spec.array_size,
        )
        outputs = [w.shape[0]]

        def copy() -> Call:
            own = packed.clone()
            rest = ([own], [w.tensor_scale], tables, [no_bias], outputs, array_size)
            if self.mode == "w4a16":
                return lambda x: ops.linear_prepacked.float_activation(x, *rest)
            activation_tables = tables if self.mode == "w4a4" else None
            return lambda x: ops.linear_prepacked.default(x, activation_tables, None, *rest, torch.float32)

        return Contender(packed.numel(), copy, product=lambda results: results[0])
