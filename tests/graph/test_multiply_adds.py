"""multiply_adds: counted by hand, and against torch's own counter of floating-point operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lobcq_fx.config import LobcqConfig
from lobcq_fx.plan import QuantizationPlan
from tests.passes.graphs import Function, aten, linear, normalized, parameter, values

SIZES = 2, 3, 64
ROWS = 2 * 3
COUNTED = {
    "linear": (lambda m, x: m.l(x), {"l": linear(32, 64)}),
    "weight on the left": (lambda m, x: m.w @ x, {"w": parameter(48, 5)}),
    "3-D weight": (lambda m, x: x @ m.w, {"w": parameter(2, 64, 32)}),
    "computed weight": (lambda m, x: x @ (m.w * 2), {"w": parameter(64, 32)}),
    "conv1d": (lambda m, x: m.c(x), {"c": nn.Conv1d(5, 6, 3, groups=1)}),
    "grouped conv1d": (lambda m, x: m.c(x.mT), {"c": nn.Conv1d(64, 64, 3, groups=4)}),
    "conv2d": (lambda m, x: m.c(x[:, None]), {"c": nn.Conv2d(1, 4, 3, stride=2)}),
    "conv_transpose1d": (lambda m, x: m.c(x), {"c": nn.ConvTranspose1d(5, 6, 3)}),
}


def total(function, members, sizes=(2, 5, 64)):
    graph_module = normalized(Function(function, **members), values(*sizes))
    return sum(matmul.multiply_adds for matmul in QuantizationPlan.of(graph_module, LobcqConfig()).matmuls)


@pytest.mark.parametrize("case", COUNTED)
def test_torch_counts_twice_as_many_floating_point_operations(case):
    function, members = COUNTED[case]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Function(function, **members)(values(2, 5, 64))
    assert counter.get_total_flops() > 0
    assert 2 * total(function, members) == counter.get_total_flops()


BY_HAND = {
    "lstm": (lambda m, x: m.r(x)[0], {"r": nn.LSTM(64, 64, batch_first=True)}, ROWS * (4 * 64 * 64 * 2)),
    "two layers, both ways": (
        lambda m, x: m.r(x)[0], {"r": nn.GRU(64, 32, 2, bidirectional=True, batch_first=True)},
        ROWS * 2 * 3 * 32 * (64 + 32 + 64 + 32),
    ),
    "bilinear": (lambda m, x: m.b(x, x), {"b": nn.Bilinear(64, 64, 32)}, ROWS * 32 * 64 * 64),
    "einsum": (lambda m, x: torch.einsum("btk,hkn->bhtn", x, m.w), {"w": parameter(4, 64, 8)}, ROWS * 4 * 64 * 8),
    "einsum with dots": (lambda m, x: torch.einsum("...k,kn->...n", x, m.w), {"w": parameter(64, 8)}, ROWS * 64 * 8),
    "attention": (lambda m, x: nn.functional.scaled_dot_product_attention(x, x, x), {}, 0),
    "embedding": (lambda m, x: m.e(x.long().abs() % 8), {"e": nn.Embedding(8, 64)}, 0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # of recurrent layers, in torch.export
@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    function, members, expected = BY_HAND[case]
    assert total(function, members, SIZES) == expected


def test_experts_count_by_the_tokens_they_get():
    """Six of ten tokens' rows go to experts, whatever the number of experts."""

    def experts(m, x):
        rows = x.flatten(0, 1)[:6].bfloat16()
        return torch._grouped_mm(rows, m.w, offs=m.ends)

    weight = nn.Parameter(values(3, 64, 32).bfloat16())
    ends = nn.Parameter(torch.tensor([2, 2, 6], dtype=torch.int32), requires_grad=False)
    graph_module = normalized(Function(experts, w=weight, ends=ends), values(2, 5, 64))
    (matmul,) = QuantizationPlan.of(graph_module, LobcqConfig()).matmuls
    assert matmul.multiply_adds == 6 * 64 * 32
    assert matmul.float_bytes == 2 * 3 * 64 * 32
    assert aten._grouped_mm.default in [node.target for node in graph_module.graph.nodes]
