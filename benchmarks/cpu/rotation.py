"""What rotating activations costs a linear on the CPU: the same layer with and without, results compared first.

    python -m benchmarks.cpu.rotation

One process, both in turns; the time of a layer with rotation over that without, medians. In a model the rotation is
shared by all layers that read one activation, so that this is the most it costs. Writes
benchmarks/results/rotation.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.benchmarking.contender import copies_needed
from lobcq_fx.benchmarking.machine import cpu_name
from lobcq_fx.benchmarking.race import Burst, median_ratio, race

RESULT = Path(__file__).parents[1] / "results" / "rotation.json"
SHAPES = ((4096, 4096), (2048, 2048), (576, 576))
ROWS = (1, 16, 512)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        plain, rotated = layers(shape)
        for count in ROWS:
            x = activation(shape[1], count)
            bursts = {name: burst(layer, x) for name, layer in (("plain", plain), ("rotated", rotated))}
            seconds = race(bursts, arguments.rounds)
            ratio = median_ratio(seconds["rotated"], seconds["plain"])
            rows.append({"N x K": f"{shape[0]} x {shape[1]}", "rows": count, "times": round(ratio, 3)})
            print(json.dumps(rows[-1]), flush=True)
    found = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    found |= {"machine": platform.machine(), "command": "python -m benchmarks.cpu.rotation"}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def activation(columns: int, rows: int) -> Tensor:
    """[1, rows, columns], with columns that stand out, so that rotation is chosen."""
    x = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(rows))
    x[..., 5::64] *= 25
    return x


@torch.no_grad()
def layers(shape: tuple[int, int]) -> tuple[nn.Module, nn.Module]:
    """One linear in W4A4 without and with rotation.

    Raises:
        AssertionError: it was not rotated, or does not come closer to the float layer.
    """
    torch.manual_seed(0)
    linear, x = nn.Linear(shape[1], shape[0], bias=False), activation(shape[1], 64)
    plain, rotated = (
        lobcq_fx.quantize(linear, [x], LobcqConfig(rotation=rotation)) for rotation in ("none", "hadamard")
    )
    assert rotated.inventory.quantized[0].rotated
    expected = linear(x)
    errors = [(one(x) - expected).square().mean() for one in (plain, rotated)]
    assert errors[1] < errors[0], errors
    return plain, rotated


def burst(layer: nn.Module, x: Tensor) -> Burst:
    """Calls of copies of a layer, so many that none finds its weight in a cache while rows are few."""
    weight_bytes = sum(buffer.nbytes for buffer in layer.buffers())
    return [partial(_call, copy.deepcopy(layer), x) for _ in range(copies_needed(weight_bytes, x.shape[1]))]


@torch.inference_mode()
def _call(layer: nn.Module, x: Tensor) -> object:
    return layer(x)


if __name__ == "__main__":
    main()
