"""What routed experts cost on the CPU beside dense linears of the same work: results compared first, bit for bit.

    python -m benchmarks.cpu.experts

A grouped linear of 8 of 64 experts, each with as many rows, against one call of 8 dense linears of those rows, whose
weights are the same 8 matrices: as many multiply-adds and as many bytes of weights. The last row has 256 tokens that go
to 8 experts each as they come, against one dense linear for each expert and its rows. Weights are too many for any
cache; calls go round all of them. One process, both in turns; the time of grouped over dense, medians. Writes
benchmarks/results/experts.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.benchmarking.machine import cpu_name
from lobcq_fx.benchmarking.ours import require_core
from lobcq_fx.benchmarking.race import median_ratio, race
from lobcq_fx.calibration.encode_weight import encode_stacked_weight
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.format.stacked import group_bounds
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.modules.packed_weight import PackedWeight

RESULT = Path(__file__).parents[1] / "results" / "experts.json"
EXPERTS, TAKEN = 64, 8
SHAPES = ((1408, 2048), (2048, 1408))
"""N x K of the experts of DeepSeek-V2-Lite, which has 64."""

ROWS = (1, 2, 4, 16, 128)
TOKENS = 256


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    require_core()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        stack = Stack(*shape)
        for count in ROWS:
            work = f"{TAKEN} of {EXPERTS} experts, {count} row{'s' if count > 1 else ''} each"
            rows.append(row(shape, work, *stack.some_experts(count), arguments.rounds))
        work = f"{TOKENS} tokens, {TAKEN} of {EXPERTS} experts each"
        rows.append(row(shape, work, *stack.tokens_as_they_come(TOKENS), arguments.rounds))
    found = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    found |= {"machine": platform.machine(), "command": "python -m benchmarks.cpu.experts"}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


Calls = list[Callable[[], list[Tensor]]]
"""Each returns the rows of its result, in one piece or in several."""


def row(shape: tuple[int, int], what: str, grouped: Calls, dense: Calls, rounds: int) -> dict[str, Any]:
    """Both measured, once they agree.

    Raises:
        AssertionError: they do not.
    """
    for one, other in zip(grouped, dense, strict=True):
        assert torch.equal(torch.cat(one()), torch.cat(other())), f"{shape}, {what}: other results"
    seconds = race({"grouped": grouped, "dense": dense}, rounds)
    ratio = median_ratio(seconds["grouped"], seconds["dense"])
    found = {"N x K": f"{shape[0]} x {shape[1]}", "work": what, "times": round(ratio, 3)}
    print(json.dumps(found), flush=True)
    return found


class Stack:
    """The weights of experts, as one stack and as dense weights, both in kernel layout."""

    def __init__(self, outputs: int, columns: int) -> None:
        torch.manual_seed(0)
        self.spec, self.outputs, self.columns = FormatSpec(), outputs, columns
        codebooks = universal_codebooks(self.spec.num_codebooks)
        layout = weight_layout(torch.device("cpu"))
        assert layout is not None
        packed = PackedWeight(
            encode_stacked_weight(torch.randn(EXPERTS, outputs, columns) * 0.05, self.spec, codebooks, "experts")
        )
        packed.repack(layout)
        self.tables = layout.tables(codebooks)
        self.stack, self.scales = packed.prepacked, packed.tensor_scale
        self.dense = list(self.stack.clone())  # in one piece of memory too, which is mapped alike
        self.dense_scales = [scale.clone() for scale in self.scales]

    def some_experts(self, rows: int) -> tuple[Calls, Calls]:
        """Calls of 8 experts after another, with the same rows for each of them."""
        x = torch.randn(rows, self.columns)
        gather = torch.arange(rows).repeat(TAKEN)
        grouped: Calls = []
        dense: Calls = []
        for first in range(0, EXPERTS, TAKEN):
            ends = (torch.arange(1, EXPERTS + 1) - first).clamp(0, TAKEN) * rows
            grouped.append(partial(self._grouped, x, ends.int(), gather))
            dense.append(partial(self._dense, x, range(first, first + TAKEN)))
        return grouped, dense

    def tokens_as_they_come(self, tokens: int) -> tuple[Calls, Calls]:
        """One call; each token goes to 8 experts at random."""
        x = torch.randn(tokens, self.columns)
        experts, order = torch.rand(tokens, EXPERTS).topk(TAKEN).indices.flatten().sort()
        ends = experts.bincount(minlength=EXPERTS).cumsum(0).int()
        rows = order // TAKEN
        parts = [x[rows[start:stop]] for start, stop in group_bounds(ends.tolist(), len(rows))]
        return [partial(self._grouped, x, ends, rows)], [partial(self._one_by_one, parts)]

    @torch.inference_mode()
    def _grouped(self, x: Tensor, ends: Tensor, rows: Tensor) -> list[Tensor]:
        size = (self.outputs, self.spec.array_size, torch.float32)
        stored = (self.stack, self.scales, self.tables)
        return [torch.ops.lobcq.grouped_linear_prepacked(x, self.tables, None, *stored, ends, rows, *size)]

    @torch.inference_mode()
    def _dense(self, x: Tensor, experts: range) -> list[Tensor]:
        weights, scales = [self.dense[index] for index in experts], [self.dense_scales[index] for index in experts]
        absent, outputs = [torch.empty(0)] * len(weights), [self.outputs] * len(weights)
        rest = (self.tables, absent, outputs, self.spec.array_size, torch.float32)
        results: list[Tensor] = torch.ops.lobcq.linear_prepacked(x, self.tables, None, weights, scales, *rest)
        return results

    @torch.inference_mode()
    def _one_by_one(self, parts: list[Tensor]) -> list[Tensor]:
        return [self._dense(part, range(index, index + 1))[0] for index, part in enumerate(parts)]


if __name__ == "__main__":
    main()
