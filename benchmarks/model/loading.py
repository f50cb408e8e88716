"""How long `lobcq_fx.load` takes with and without comparing digests: linears of random weights, in turns.

python -m benchmarks.model.loading                     # 1,074 million weights: 604 MB on disk
python -m benchmarks.model.loading --layers 4 --size 1024

Both read a file that the system has in its cache, so that the digests' share is at its largest.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import lobcq_fx

RESULT = Path(__file__).parents[1] / "results" / "loading.json"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help=f"default with the default sizes: {RESULT.name}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target, x = Path(folder) / "q", torch.randn(2, arguments.size).bfloat16()
        save(target, arguments.layers, arguments.size, x)
        assert torch.equal(lobcq_fx.load(target)(x), lobcq_fx.load(target, verify=False)(x))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(arguments.rounds):
            for verify in (True, False) if number % 2 else (False, True):
                gc.collect()  # the model before, whose memory would be given back at any time
                start = time.perf_counter()
                lobcq_fx.load(target, verify=verify)
                seconds[verify].append(time.perf_counter() - start)
        ratios = [one / other for one, other in zip(seconds[True], seconds[False], strict=True)]
        result = {
            "weights": arguments.layers * arguments.size**2,
            "bytes": sum(file.stat().st_size for file in target.iterdir()),
            "threads": torch.get_num_threads(),
            "torch": version("torch"),
            "seconds": {"verify": statistics.median(seconds[True]), "no verify": statistics.median(seconds[False])},
            "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        }
    print(json.dumps(result, indent=1))
    output = arguments.output or (RESULT if (arguments.layers, arguments.size) == (64, 4096) else None)
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def save(target: Path, layers: int, size: int, x: torch.Tensor) -> None:
    """A model whose float weights are made one after the other, and let go as they are quantized."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size, bias=False, dtype=torch.bfloat16) for _ in range(layers))).eval()
    lobcq_fx.quantize(model, example_inputs=x, inplace=True).save_pretrained(target)


if __name__ == "__main__":
    main()
