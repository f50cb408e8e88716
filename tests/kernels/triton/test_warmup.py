"""What warming up runs."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.triton import warmup as module
from lobcq_fx.kernels.triton.warmup import Linears, rows_to_warm, warmup
from tests.kernels.triton.operands import DEVICE

SPEC = FormatSpec(8, 64)


def test_every_variant_of_rows() -> None:
    """One row, fewer than eight, more, sixteen; then multiples of 16 and others, in every bucket."""
    assert rows_to_warm(40) == [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32]
    assert rows_to_warm(1) == [1]


@pytest.mark.parametrize("activation", [8, None])
@pytest.mark.parametrize("static_scale", [True, False])
def test_it_runs(activation: int | None, static_scale: bool) -> None:
    one = Linears(130, (20, 5), (True, False), SPEC, activation, static_scale, torch.bfloat16)
    warmup([one], [1, 17], DEVICE)


def test_linears_that_are_alike_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(module, "_run", lambda one, rows, device: found.append((one, rows)))
    one, other = (Linears(k, (20,), (True,), SPEC, None, False, torch.float16) for k in (64, 128))
    warmup([one, other, one], [2, 1, 2], torch.device("cpu"))
    assert found == [(one, 1), (one, 2), (other, 1), (other, 2)]
