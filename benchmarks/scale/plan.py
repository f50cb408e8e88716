"""How long quantizing takes on many machines: a simulation by what was measured, `python -m benchmarks.scale.plan`.

Parameters of published shapes are divided among ranks by the code that does so (`lobcq_fx.streaming.shares`), and each
rank's take what benchmarks/results/streaming.json measured for a GiB of bf16, encoded or copied, without calibration:
processor time of one thread of the machine named there. Disks and networks are taken to keep up.

Where streaming.json has runs of several processes, each one's time on the clock stands beside what the simulation says.
Writes benchmarks/results/plan.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
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


def main() -> None:
    """Simulate, print, write."""
    streaming = json.loads((RESULTS / "streaming.json").read_text(encoding="utf-8"))
    rate = encoding_rate(streaming)
    result = {
        "cpu": streaming["machine"]["cpu"],
        "encode_seconds_a_gib": rate,
        "rows": [planned(name, shape, rate) for name, shape in SHAPES.items()],
        "checked": checked(streaming, rate),
    }
    print(json.dumps(result, indent=1))
    (RESULTS / "plan.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def encoding_rate(streaming: dict[str, Any]) -> float:
    """Processor seconds for a GiB of bf16 that is encoded, all steps included, of the largest model measured."""
    one = streaming["sizes"][max(streaming["sizes"], key=float)]
    costs = costs_of(Shape(128256, 4096, 14336, one["layers"], 1024))
    return float(one["ways"]["streamed"]["processor_seconds"] / (sum(costs.values()) / GIB))


def costs_of(shape: Shape) -> dict[str, int]:
    """Of each parameter, in bytes of bf16 that are encoded."""
    sizes = {name: 2 * prod(size) for name, size, _ in shape.parameters()}
    packed = {name for name, _, encoded in shape.parameters() if encoded}
    return {name: size // COPIED + (size if name in packed else 0) for name, size in sizes.items()}


def planned(name: str, shape: Shape, rate: float) -> dict[str, Any]:
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
        "hours": {str(ranks): simulated(shape, rate, ranks) / 3600 for ranks in RANKS},
    }


def simulated(shape: Shape, rate: float, ranks: int) -> float:
    """Seconds until the last rank is done, each on one thread of its own."""
    costs = costs_of(shape)
    return max(sum(costs[name] for name in share) for share in divided(costs, ranks)) / GIB * rate


def checked(streaming: dict[str, Any], rate: float) -> list[dict[str, Any]]:
    """Runs of several processes beside what the simulation says."""
    found = []
    for size, one in streaming["sizes"].items():
        shape = Shape(128256, 4096, 14336, one["layers"], 1024)
        for way, measured in one["ways"].items():
            count = way.partition(" processes")[0]
            if count.isdigit():
                times = {"simulated_seconds": simulated(shape, rate, int(count)), "seconds": measured["seconds"]}
                found.append({"gigabytes": size, "processes": int(count), **times})
    return found


if __name__ == "__main__":
    main()
