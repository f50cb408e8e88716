"""Norms and gated activations by their rules, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from lobcq_fx.ops.prologues import layer_norm, rms_norm, silu_mul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_same_but_for_a_rounding(actual: Tensor, expected: Tensor) -> None:
    """Equal nearly everywhere, and nowhere apart by more than a few roundings."""
    assert actual.dtype == expected.dtype
    exact, rounding = actual.double(), torch.finfo(actual.dtype).eps
    assert bool(((exact - expected.double()).abs() <= 4 * rounding * exact.abs() + 1e-7).all())
    if actual.dtype != torch.float32:  # there the sum's order shows in the last bit
        assert (actual != expected).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("norm", "rule"),
    [
        (LlamaRMSNorm, {}),
        (Gemma2RMSNorm, {"offset": 1.0, "round_first": False}),
        (Olmo2RMSNorm, {"round_first": False}),
    ],
    ids=["llama", "gemma2", "olmo2"],
)
@torch.no_grad()
def test_the_families_norms(norm: type, rule: dict, dtype: torch.dtype) -> None:
    module = norm(300, eps=1e-5)
    module.weight.copy_(values(300))
    module, x = module.to(dtype), values(40, 300, dtype=dtype)
    assert_same_but_for_a_rounding(rms_norm(x, module.weight, 1e-5, **rule), module(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", [(True, True), (True, False), (False, False)], ids=str)
def test_layer_norm(dtype: torch.dtype, parameters: tuple[bool, bool]) -> None:
    x = values(40, 300, dtype=dtype) + 3
    weight, bias = (values(300, dtype=dtype) + i if given else None for i, given in enumerate(parameters))
    expected = torch.nn.functional.layer_norm(x, (300,), weight, bias, 1e-5)
    actual = layer_norm(x, weight, bias, 1e-5)
    # Of two numbers of about the bias's size, the difference: what either rounds away is relative to those.
    torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    gate, up = 4 * values(40, 300, dtype=dtype), values(300, 40, dtype=dtype).view(40, 300)
    assert_same_but_for_a_rounding(silu_mul(gate, up), torch.nn.functional.silu(gate) * up)


def test_the_mean_does_not_depend_on_the_order_of_the_sum() -> None:
    """In fp32 the same numbers in another order have another mean, in the last bit."""
    x = values(2000, 700)
    shuffled = x[:, torch.randperm(700, generator=torch.Generator().manual_seed(0))]
    assert not torch.equal(x.square().mean(-1), shuffled.square().mean(-1))
    first = x[:, :1]  # one column of each, to see the factor alone
    one, other = (rms_norm(torch.cat((first, rest), 1), None, 1e-6)[:, 0] for rest in (x, shuffled))
    assert torch.equal(one, other)


def test_a_gate_of_minus_infinity_closes() -> None:
    gate = torch.tensor([-200.0, 0.0, 200.0])
    assert torch.equal(silu_mul(gate, torch.ones(3)), torch.tensor([-0.0, 0.0, 200.0]))
