"""Draw what benchmarks/gpu/measure.py measured: each linear's speed against bf16, under the bound that memory sets.

python -m benchmarks.gpu.plot                                         # docs/images/gpu_linears.svg
python -m benchmarks.gpu.plot --results /tmp/smoke.json -o /tmp/plot.svg    # of a smoke run
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
IMAGE = ROOT / "docs" / "images" / "gpu_linears.svg"
BASELINE = "bf16"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("-o", "--output", type=Path, default=IMAGE)
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text(encoding="utf-8")), arguments.output)


def draw(found: dict[str, Any], output: Path) -> None:
    """One panel for few rows and one for many: speed over bf16, one group of bars for each linear and M."""
    bandwidth = found["copy"]["bytes_per_second"]
    figure, axes = plt.subplots(2, 1, figsize=(12, 8), layout="constrained")
    for axis, section in zip(axes, ("few rows", "many rows"), strict=True):
        results = found[section]
        names = sorted({name for result in results for name in result["times"]} - {BASELINE})
        for i, name in enumerate(names):
            places = [x + (i - len(names) / 2) * 0.8 / len(names) for x in range(len(results))]
            speeds = [result["times"].get(name, {}).get(f"times {BASELINE}", 0) for result in results]
            axis.bar(places, speeds, 0.8 / len(names), label=name)
        if section == "few rows":
            bounds = [r["times"][BASELINE]["us"] / 1e6 * bandwidth / r["bytes"] for r in results]
            axis.plot(range(len(results)), bounds, "k_", markersize=18, label="bytes at copy bandwidth, 4.5 bits")
        axis.axhline(1, color="gray", linewidth=0.8)
        labels = [f"{r['linear']}\nM = {r['rows']}" for r in results]
        axis.set_xticks(range(len(results)), labels, fontsize=6, rotation=60)
        axis.set_ylabel(f"times as fast as {BASELINE}")
        axis.set_title(section)
        axis.legend(fontsize=7)
    figure.suptitle(found["machine"].get("gpu", "no GPU: these numbers mean nothing"))
    figure.savefig(output)


if __name__ == "__main__":
    main()
