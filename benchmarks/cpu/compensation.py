"""What rounding with feedback takes: the whole of `compensate`, its factor and its op, and the op's default in torch.

    python -m benchmarks.cpu.compensation [--threads 2]

CPU seconds of the process (all threads), the least of two runs: other processes on the machine change wall time more.
Format 8x64, synthetic correlated inputs. The torch version runs where a weight is small. What a
model of Llama-3-8B's shapes would take is derived from these rates, not measured. Writes
benchmarks/results/compensation.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lobcq_fx.ops
from lobcq_fx.benchmarking.machine import cpu_name
from lobcq_fx.calibration.compensate import _factor, compensate
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.format import FormatSpec, absmax_tensor_scale, universal_codebooks
from lobcq_fx.kernels.bind import bind_cpu_core

RESULT = Path(__file__).parents[1] / "results" / "compensation.json"
SHAPES = ((1536, 576), (576, 1536), (4096, 4096))
TORCH_LIMIT = 1 << 20
LAYERS = 32
LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
"""Of Llama-3-8B: q, k, v, o, gate, up, down."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not bind_cpu_core():
        parser.error("the C++ core was not built, or is switched off")
    rows = [measure(*shape) for shape in SHAPES]
    result = {
        "command": "python -m benchmarks.cpu.compensation",
        "measure": "CPU seconds of the process, format 8x64",
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "rows": rows,
        "derived": derived(rows),
    }
    print(json.dumps(result, indent=1))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(rows: int, columns: int) -> dict[str, Any]:
    """One shape."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    x = torch.randn(columns // 2, columns, generator=generator) * torch.exp(torch.randn(columns, generator=generator))
    moments = x.t() @ x
    spec, books = FormatSpec(), universal_codebooks(8)
    nearest = encode_weight(weight, spec, books, "weight")
    coupling, power, _ = _factor(moments / moments.diagonal().mean())
    operands = (weight, torch.zeros_like(weight), coupling, power, absmax_tensor_scale(weight), books, 64)
    small = weight.numel() <= TORCH_LIMIT
    return {
        "shape": [rows, columns],
        "nearest": seconds(lambda: encode_weight(weight, spec, books, "weight")),
        "compensate": seconds(lambda: compensate(weight, moments, nearest)),
        "factor": seconds(lambda: _factor(moments / moments.diagonal().mean())),
        "op": seconds(lambda: torch.ops.lobcq.compensate(*operands)),
        "op_in_torch": seconds(lambda: lobcq_fx.ops.compensate(*operands), runs=1) if small else None,
    }


def seconds(run: Callable[[], object], runs: int = 2) -> float:
    """The least CPU time."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return round(min(times), 3)


def derived(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """CPU minutes for all linears of Llama-3-8B: factors as K^3, the rest as N K (a + b K) through two shapes."""
    small, large = rows[0], rows[-1]
    per_scalar = [(row["compensate"] - row["factor"]) / (row["shape"][0] * row["shape"][1]) for row in (small, large)]
    slope = (per_scalar[1] - per_scalar[0]) / (large["shape"][1] - small["shape"][1])
    offset = per_scalar[0] - slope * small["shape"][1]
    factors = sum(large["factor"] * (k / large["shape"][1]) ** 3 for _, k in LAYER)
    rest = sum(n * k * (offset + slope * k) for n, k in LAYER)
    return {
        "of": "Llama-3-8B's linears, derived from the rates above, not measured",
        "factors_cpu_minutes": round(LAYERS * factors / 60, 1),
        "rest_cpu_minutes": round(LAYERS * rest / 60, 1),
    }


if __name__ == "__main__":
    main()
