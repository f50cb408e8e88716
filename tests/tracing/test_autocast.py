"""Autocast around `quantize`, around a call, and around the ops themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lobcq_fx import LobcqConfig, QuantizedModel, quantize
from lobcq_fx.format import FormatSpec, absmax_row_scale, encode, universal_codebooks

BF16, FP16 = torch.bfloat16, torch.float16
X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))

ops = torch.ops.lobcq


class Mixed(nn.Module):
    """Quantized linears around an attention, with a residual; the last linear stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.head = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.before(x).unflatten(-1, (4, 16)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return self.head(x + self.after(attended.transpose(1, 2).flatten(2)))


def model() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def quantized(mode: str = "w4a4") -> QuantizedModel:
    return quantize(model(), [X], LobcqConfig(mode=mode, exclude=("head",), codebooks="fitted"))


def test_autocast_does_reach_the_float_model() -> None:
    with torch.autocast("cpu", dtype=BF16), torch.inference_mode():
        assert model()(X).dtype == BF16


def test_quantize_captures_and_measures_the_model_in_its_own_dtypes() -> None:
    plain = quantized()
    with torch.autocast("cpu", dtype=BF16):
        under = quantized()
    assert str(under.stored_graph) == str(plain.stored_graph)
    for (name, one), (_, other) in zip(plain.state_dict().items(), under.state_dict().items(), strict=True):
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("mode", ["w4a4", "w4a16"])
def test_a_call_gives_what_it_gives_without(mode: str) -> None:
    q = quantized(mode)
    with torch.inference_mode():
        expected = q(X)
        for dtype in (BF16, FP16):
            with torch.autocast("cpu", dtype=dtype):
                assert torch.equal(q(X), expected)
    assert expected.dtype == torch.float32


def test_a_compiled_call_too() -> None:
    q = quantized()
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        expected = compiled(X)
        with torch.autocast("cpu", dtype=BF16):
            assert torch.equal(compiled(X), expected)


def test_the_ops_multiply_in_fp32() -> None:
    """Those on stored weights, whose product is torch's."""
    spec, codebooks = FormatSpec(), universal_codebooks(8)
    rows = X.flatten(0, 1)
    w = encode(torch.randn(48, 64, generator=torch.Generator().manual_seed(1)), spec, codebooks, search_scales=True)
    weight = (w.codes, w.selectors, w.scales, w.tensor_scale, codebooks)
    a = encode(rows, spec, codebooks, absmax_row_scale(rows))

    def products() -> list[Tensor]:
        packed = ops.quantize_activation(X, codebooks, 64)
        assert torch.equal(packed[0].flatten(0, 1), a.codes)
        return [
            ops.linear(*packed, codebooks, *weight, None, 64, 64, torch.float32),
            ops.linear.float_activation(X, *weight, None, 64),
        ]

    expected = products()
    with torch.autocast("cpu", dtype=BF16):
        for actual, truth in zip(products(), expected, strict=True):
            assert torch.equal(actual, truth)
