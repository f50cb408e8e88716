"""Several linears of one activation, laid out for a device's kernels, and what they have to give."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, absmax_row_scale, decode, encode, encode_int8, universal_codebooks
from lobcq_fx.modules.packed_weight import WeightLayout
from tests.kernels.products import assert_product

OUTPUTS = (33, 16, 1)
STATIC = torch.tensor(1e-4)


class LaidOutLinears:
    """Three linears, or as many as `outputs` has; the second is without a bias."""

    def __init__(
        self,
        layout: WeightLayout,
        device: torch.device,
        columns: int,
        spec: FormatSpec | None = None,
        outputs: tuple[int, ...] = OUTPUTS,
    ) -> None:
        generator = torch.Generator().manual_seed(columns)
        self.spec, self.device, self.outputs = spec or FormatSpec(), device, outputs
        self.codebooks = universal_codebooks(self.spec.num_codebooks)
        self.tables = layout.tables(self.codebooks).to(device)
        floats = [torch.randn(n, columns, generator=generator) * 0.05 for n in outputs]
        self.encoded = [encode(w, self.spec, self.codebooks) for w in floats]
        self.biases = [torch.empty(0) if i == 1 else torch.randn(n, generator=generator) for i, n in enumerate(outputs)]
        parts = [tuple(part.to(device) for part in (w.codes, w.selectors, w.scales)) for w in self.encoded]
        self.weights = [layout.pack(part, self.spec, columns) for part in parts]

    @property
    def rest(self) -> list:
        """The op's arguments behind those of the activation."""
        scales = [w.tensor_scale.to(self.device) for w in self.encoded]
        biases = [bias.to(self.device) for bias in self.biases]
        return [self.weights, scales, self.tables, biases, list(self.outputs), self.spec.array_size]

    def fake_quantized(self, x: Tensor, static: Tensor | None = None) -> Tensor:
        """The rows [M, K] that x stands for once it is encoded."""
        rows = x.float().reshape(x.shape[:-1].numel(), x.shape[-1])
        scale = absmax_row_scale(rows) if static is None else static
        return decode(encode(rows, self.spec, self.codebooks, scale))

    def in_int8(self, x: Tensor, static: Tensor | None = None) -> Tensor:
        """The same in int8."""
        rows = x.float().reshape(x.shape[:-1].numel(), x.shape[-1])
        return decode(encode_int8(rows, self.spec.array_size, static))

    def check(self, results: list[Tensor], x: Tensor, rows: Tensor) -> None:
        """The results are those of rows [M, K], the values that x stands for."""
        assert [tuple(out.shape) for out in results] == [(*x.shape[:-1], n) for n in self.outputs]
        assert all(out.is_contiguous() for out in results)
        for out, w, bias in zip(results, self.encoded, self.biases, strict=True):
            assert_product(out.reshape(len(rows), w.shape[0]), rows, w, bias.float() if bias.numel() else None)


def values(*shape: int) -> Tensor:
    """Normal numbers, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
