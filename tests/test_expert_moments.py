"""Second moments of each expert of a stack: of the tokens that it got, with a few of the average token of its layer."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers the grouped product)
from torch import Tensor, nn

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.calibration.groups import GroupMoments, Groups, prior_rows
from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.observation import Observation
from lobcq_fx.pipeline import make_plan
from lobcq_fx.tracing.trace import MAIN, trace_module

EXPERTS, N, K = 4, 24, 64
CONFIG = LobcqConfig(rounding="compensated", mode="w4a16")


class Stack(nn.Module):
    """Rows sorted by expert come in; the second expert gets none of them, the last one few."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(EXPERTS, N, K, generator=generator))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.product(torch.tanh(x), ends)

    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        out: Tensor = torch.ops.transformers.grouped_mm_fallback(x, self.w.mT, ends)
        return out


class WrittenLater(Stack):
    """What the experts read is another by the time that their weights are encoded: a layer comes after them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(N, 32)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        h = torch.tanh(x)
        out = self.product(h, ends)
        h.zero_()
        result: Tensor = self.last(out + h.sum())
        return result


class ReadTwice(Stack):
    """One stack meets two activations."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.product(torch.tanh(x), ends) + self.product(torch.tanh(x), ends)


ENDS = [[90, 90, 150, 153], [60, 60, 61, 64]]


def calls() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(K, K, generator=generator) / 4
    return [
        (torch.randn(ends[-1], K, generator=generator) @ mix, torch.tensor(ends, dtype=torch.int32)) for ends in ENDS
    ]


def expected(weight: int = 1) -> list[Tensor]:
    """By plain arithmetic in fp64, expert by expert."""
    rows = [torch.tanh(x).double() for x, _ in calls()]
    everything = torch.cat(rows)
    together = everything.T @ everything / len(everything)
    found = []
    for expert in range(EXPERTS):
        own = torch.cat(
            [one[ends[expert - 1] if expert else 0 : ends[expert]] for one, ends in zip(rows, ENDS, strict=True)]
        )
        own = torch.cat([own] * weight)
        found.append(own.T @ own + prior_rows(K) * together if len(own) else everything.T @ everything * weight)
    return found


@pytest.mark.parametrize(("kind", "weight"), [(Stack, 1), (WrittenLater, 1), (ReadTwice, 2)])
@torch.no_grad()
def test_they_are_those_of_each_expert(kind: type[Stack], weight: int) -> None:
    graph_module = trace_module(kind().eval(), calls()[0]).graph_module
    plan, _ = make_plan({MAIN: graph_module}, CONFIG)
    (part,) = Observation(graph_module, plan).run(calls(), moments=True)
    stack, found = next(part.moments(part.statistics))
    assert stack.source == "w"
    assert isinstance(found, GroupMoments)
    for index, one in enumerate(expected(weight)):
        torch.testing.assert_close(found.of_group(index).double(), one, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_weights_are_encoded_by_them_and_experts_of_few_tokens_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model, moments = Stack().eval(), expected()
    with caplog.at_level(logging.WARNING):
        q = lobcq_fx.quantize(model, calls(), CONFIG)
    stack, codebooks = get_attribute(q.graph_module, "w"), universal_codebooks(8)
    stack.restore()
    for index in range(EXPERTS):
        one = encode_weight(model.w[index], FormatSpec(8, 64), codebooks, "w", moments[index].float())
        assert (stack.codes[index] == one.codes).float().mean() > 0.98  # sums in another order may move a code
        nearest = encode_weight(model.w[index], FormatSpec(8, 64), codebooks, "w")
        assert (nearest.codes == one.codes).float().mean() < 0.95
    (record,) = q.inventory.quantized
    assert (record.unreached, record.undersampled) == (1, 2)
    assert "2 of 4 experts of w got fewer than 16 tokens (1 none) of the calibration data" in caplog.text


def test_rows_of_zeros_are_of_other_experts() -> None:
    """Groups of one size, as Llama 4 has them, are those of the same rows by offsets."""
    rows = torch.randn(7, K)
    padded = torch.zeros(3, 5, K)
    padded[0, 1:4], padded[2, [0, 2, 3, 4]] = rows[:3], rows[3:]
    found, other = Groups.of(padded, None), Groups.of(rows, torch.tensor([3, 3, 7], dtype=torch.int32))
    assert torch.equal(found.rows, other.rows)
    assert found.bounds == other.bounds == ((0, 3), (3, 3), (3, 7))
    behind = Groups.of(rows, torch.tensor([3, 3, 5], dtype=torch.int32))  # two rows of no group
    assert torch.equal(behind.rows, rows[:5])


@pytest.mark.parametrize("split", [False, True])
def test_statistics_of_groups(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if split:
        monkeypatch.setattr("lobcq_fx.calibration.statistics.CHUNK", 100)
    statistics = ActivationStatistics("layer", FormatSpec(8, 16))
    data = [(torch.tanh(x), ends) for x, ends in calls()]
    for x, ends in data:
        statistics.update_groups(x, ends)
    assert statistics.group_rows is not None
    assert statistics.group_rows.tolist() == [150, 0, 61, 6]
    means = torch.stack([one.diagonal() for one in expected()])
    means = means / (statistics.group_rows + prior_rows(K))[:, None]
    found = statistics.mean_squares_of_groups().double()
    torch.testing.assert_close(found[[0, 2, 3]], means[[0, 2, 3]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], statistics.mean_squares().double())
    check_divided(statistics, data)


def check_divided(statistics: ActivationStatistics, data: list[tuple[Tensor, Tensor]]) -> None:
    """By scales of each group: as if the rows had been divided before they were seen."""
    scale = torch.exp2(torch.arange(EXPERTS * K).view(EXPERTS, K) * 7 % 5 - 2.0)
    divided, seen = statistics.divided(scale), ActivationStatistics("layer", FormatSpec(8, 16))
    for x, ends in data:
        numbers = torch.bucketize(torch.arange(len(x)), ends.long(), right=True)
        seen.update_groups(x / scale[numbers], ends)
    assert torch.equal(divided.sample(), seen.sample())
    assert divided.static_tensor_scale() == seen.static_tensor_scale()
    torch.testing.assert_close(divided.mean_squares_of_groups()[[0, 2]], seen.mean_squares_of_groups()[[0, 2]])
    in_group = [(x / scale[2], ends) for x, ends in data]  # as the third matrix would see all rows
    found, expected = (
        GroupMoments([Groups.of(*one) for one in rows], statistics.encoded_moments).of_group(2)
        for rows, statistics in ((data, divided), (in_group, seen))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
