"""Models quantized and called under another default dtype or device: everything is as without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import lobcq_fx
from lobcq_fx import FormatSpec, LobcqConfig, QuantizedModel
from tests.families import quantized_causal_lm
from tests.sweeps import sweep

IDS = torch.tensor([[5, 9, 13, 21], [7, 3, 40, 8]])
CALL = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_same_state(one: QuantizedModel, other: QuantizedModel) -> None:
    states = one.state_dict(), other.state_dict()
    assert {name: value.dtype for name, value in states[0].items()} == {n: v.dtype for n, v in states[1].items()}
    for name, value in states[0].items():
        assert torch.equal(value.reshape(-1).view(torch.uint8), states[1][name].reshape(-1).view(torch.uint8)), name


@torch.inference_mode()
def results(q: QuantizedModel) -> list[Tensor]:
    options = {"max_new_tokens": 4, "do_sample": False}
    return [q(**CALL).logits, q.generate(**CALL, **options), q.generate(**CALL, **options, num_beams=2)]


@pytest.mark.parametrize("dtype", sweep([torch.bfloat16, torch.float16], [torch.bfloat16]))
def test_a_language_model(dtype: torch.dtype) -> None:
    model, q = quantized_causal_lm("llama")
    expected = results(q)
    assert expected[0].dtype == torch.float32
    with default_dtype(dtype):
        under = lobcq_fx.quantize(model, static_cache=dtype == torch.bfloat16)
        actual = results(under)
    assert_same_state(under, q)
    assert str(under.stored_graph) == str(q.stored_graph)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    if dtype == torch.bfloat16:
        graphs = [str(model.graphs["static_cache"].stored) for model in (under, q)]
        assert graphs[0] == graphs[1]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 24)).eval()


X = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
FITTED = LobcqConfig(FormatSpec(2, 32), codebooks="fitted", activation_scale="static")


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, "meta"])
def test_a_fit_to_calibration_data(default: torch.dtype | str) -> None:
    model = mlp()
    q = lobcq_fx.quantize(model, [X], FITTED)
    with default_dtype(default) if isinstance(default, torch.dtype) else torch.device(default):
        under = lobcq_fx.quantize(model, [X], FITTED)
        actual = under(X)
    assert_same_state(under, q)
    assert torch.equal(actual, q(X))
