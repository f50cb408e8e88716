"""How long quantizing takes on many machines: a simulation by what was measured, `python -m benchmarks.scale.plan`.

Parameters of published shapes are divided among ranks by the code that does so (`lobcq_fx.streaming.shares`), without
calibration. Three constants come from benchmarks/results/streaming.json, where one process and two have quantized a
small model, and one a large one: seconds of every process, such as imports; of every process for a GiB that is packed,
since each traces the whole model; and for a GiB of its own share. All are processor time of one thread of the machine
named there. Disks and networks are taken to keep up.

Runs of more processes stand beside what the simulation says of them. Writes benchmarks/results/plan.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from lobcq_fx.format import FormatSpec
from lobcq_fx.streaming.shares import COPIED, divided

RESULTS = Path(__file__).parents[1] / "results"
GIB = 2**30
RANKS = (1, 8, 64)
FIXED_GIB, LARGEST_TENSORS = 1.5, 2
"""Of memory, for each rank, as benchmarks/scale/streaming.py checks it."""


@dataclass(frozen=True)
class Shape:
    """A decoder-only model: what its parameters are."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    key_value: int
    experts: int = 0
    """Of `intermediate` columns each, in the place of one MLP; stacked."""

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Name, shape, and whether it is packed."""
        yield "embed", (self.vocabulary, self.hidden), False
        yield "head", (self.vocabulary, self.hidden), False
        stack = (self.experts,) if self.experts else ()
        for layer in range(self.layers):
            yield f"{layer}.q", (self.hidden, self.hidden), True
            yield f"{layer}.k", (self.key_value, self.hidden), True
            yield f"{layer}.v", (self.key_value, self.hidden), True
            yield f"{layer}.o", (self.hidden, self.hidden), True
            if stack:
                yield f"{layer}.gate_up", (*stack, 2 * self.intermediate, self.hidden), True
            else:
                yield f"{layer}.gate", (self.intermediate, self.hidden), True
                yield f"{layer}.up", (self.intermediate, self.hidden), True
            yield f"{layer}.down", (*stack, self.hidden, self.intermediate), True


SHAPES = {
    "8B": Shape(128256, 4096, 14336, 32, 1024),
    "70B": Shape(128256, 8192, 28672, 80, 1024),
    "405B": Shape(128256, 16384, 53248, 126, 1024),
    "1T mixture": Shape(163840, 7168, 2048, 61, 1024, experts=384),
}
"""Of Llama 3 and 3.1, and of a mixture of 384 experts a layer."""


@dataclass(frozen=True)
class Rates:
    """Seconds: of a process, of a process for a GiB of the model, and for a GiB of its share."""

    process: float
    whole: float
    share: float

    def clock(self, shape: Shape, ranks: int) -> float:
        """Until the last rank is done, each on a thread of its own."""
        costs = costs_of(shape)
        longest = max(sum(costs[name] for name in share) for share in divided(costs, ranks))
        return self.process + self.whole * gib(costs) + self.share * longest / GIB

    def processor(self, shape: Shape, ranks: int) -> float:
        """Of all ranks together."""
        total = gib(costs_of(shape))
        return ranks * (self.process + self.whole * total) + self.share * total


def main() -> None:
    """Simulate, print, write."""
    streaming = json.loads((RESULTS / "streaming.json").read_text(encoding="utf-8"))
    rates = rates_of(streaming["sizes"])
    result = {
        "cpu": streaming["machine"]["cpu"],
        "rates": asdict(rates),
        "rows": [planned(name, shape, rates) for name, shape in SHAPES.items()],
        "checked": checked(streaming["sizes"], rates),
    }
    print(json.dumps(result, indent=1))
    (RESULTS / "plan.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def rates_of(sizes: dict[str, Any]) -> Rates:
    """From the smallest model that two processes have divided, and the largest one."""
    small = sizes[min((size for size, one in sizes.items() if "2 processes" in one["ways"]), key=float)]
    large = sizes[max(sizes, key=float)]
    costs = [gib(costs_of(measured_shape(one))) for one in (small, large)]
    alone, together = (small["ways"][way]["processor_seconds"] for way in ("streamed", "2 processes"))
    share = (2 * alone - together) / costs[0]
    undivided = [
        one["ways"]["streamed"]["processor_seconds"] - share * cost
        for one, cost in zip((small, large), costs, strict=True)
    ]
    whole = (undivided[1] - undivided[0]) / (costs[1] - costs[0])
    return Rates(undivided[0] - whole * costs[0], whole, share)


def measured_shape(one: dict[str, Any]) -> Shape:
    """Of a model that benchmarks/scale/streaming.py makes."""
    return Shape(128256, 4096, 14336, one["layers"], 1024)


def gib(costs: dict[str, int]) -> float:
    """Of all parameters."""
    return sum(costs.values()) / GIB


def costs_of(shape: Shape) -> dict[str, int]:
    """Of each parameter, in bytes of bf16 that are encoded."""
    sizes = {name: 2 * prod(size) for name, size, _ in shape.parameters()}
    packed = {name for name, _, encoded in shape.parameters() if encoded}
    return {name: size // COPIED + (size if name in packed else 0) for name, size in sizes.items()}


def planned(name: str, shape: Shape, rates: Rates) -> dict[str, Any]:
    """What one model takes."""
    sizes = {one: 2 * prod(size) for one, size, _ in shape.parameters()}
    packed = {one for one, _, encoded in shape.parameters() if encoded}
    bits = FormatSpec(8, 64).bits_per_scalar
    return {
        "model": name,
        "parameters": sum(sizes.values()) // 2,
        "float_gib": sum(sizes.values()) / GIB,
        "packed_gib": sum(size * bits / 16 if one in packed else size for one, size in sizes.items()) / GIB,
        "memory_gib": FIXED_GIB + LARGEST_TENSORS * max(sizes.values()) / GIB,
        "hours": {str(ranks): rates.clock(shape, ranks) / 3600 for ranks in RANKS},
    }


def checked(sizes: dict[str, Any], rates: Rates) -> list[dict[str, Any]]:
    """Runs of three processes and more beside what the simulation says: processor time, of which a machine with fewer
    cores takes no more."""
    found = []
    for size, one in sizes.items():
        for way, measured in one["ways"].items():
            count = way.partition(" processes")[0]
            if count.isdigit() and int(count) > 2:
                simulated = rates.processor(measured_shape(one), int(count))
                seconds = {"simulated_seconds": simulated, "seconds": measured["processor_seconds"]}
                found.append({"gigabytes": size, "processes": int(count), **seconds})
    return found


if __name__ == "__main__":
    main()
