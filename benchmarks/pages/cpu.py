"""Put what was measured under AVX2 into docs/cpu.md, between its markers.

    python -m benchmarks.pages.cpu           # rewrite the page
    python -m benchmarks.pages.cpu --check   # exit with 1 if it differs

The scripts are those of the README's tables: `python -m benchmarks.cpu.linears --output
benchmarks/results/cpu_avx2.json` and `python -m benchmarks.model.generation --output
benchmarks/results/cpu_model_avx2.json`, on a CPU without AVX-512 or under LOBCQ_CPU_ISA=avx2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.pages.cpu_models import model_section, step_section
from benchmarks.pages.cpu_tables import cpu_section
from benchmarks.pages.markdown import keep_page, table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cpu.md"


NOT_MEASURED = "Not measured."


def main() -> None:
    """Fill the page."""
    model = results("cpu_model_avx2")
    parts = {
        "linears": linears("cpu_avx2"),
        "linears-w4a8": linears("cpu_avx2_w4a8"),
        "models": f"{_made_on(model)}:\n\n{model_section(model)}" if model else NOT_MEASURED,
        "steps": step_section(model) if model else NOT_MEASURED,
        "first-token": first_token(results("first_token")),
    }
    keep_page(PAGE, parts, "cpu", __doc__)


def linears(name: str) -> str:
    """What benchmarks/cpu/linears.py wrote."""
    found = results(name)
    return cpu_section(found) if found else NOT_MEASURED


def first_token(report: Mapping[str, Any]) -> str:
    """What benchmarks/model/first_token.py wrote."""
    if not report:
        return NOT_MEASURED
    steps = [f"`lobcq quantize`: {step}" for step in report["quantize"][0]["steps"]]
    header = ["seconds", *(f"{one['threads']} thread{'s' * (one['threads'] > 1)}" for one in report["quantize"])]
    quantized = [[f"{one['steps'][step]:.1f}" for one in report["quantize"]] for step in report["quantize"][0]["steps"]]
    opened = {step: [f"{one['steps'][step][0]:.2f}" for one in report["open"]] for step in report["open"][0]["steps"]}
    rows = [
        ["`lobcq quantize`, all of the process", *(f"{one['seconds']:.1f}" for one in report["quantize"])],
        *([title, *row] for title, row in zip(steps, quantized, strict=True)),
        *([f"new process: {step}", *row] for step, row in opened.items()),
    ]
    size = f"{report['parameters'] / 1e9:.2f} billion parameters, {report['float_bytes'] / 1e9:.2f} GB in bf16"
    quantized_size = f"{report['packed_bytes'] / 1e9:.2f} GB quantized"
    return f"{_made_on(report)}; {size}, {quantized_size}:\n\n{table(header, rows)}"


def _made_on(model: Mapping[str, Any]) -> str:
    versions = (f"{name} {version}" for name, version in model["versions"].items() if isinstance(version, str))
    return f"{model['cpu']}; {', '.join(versions)}"


def results(name: str) -> dict[str, Any]:
    """What a benchmark wrote; nothing where it was not run."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


if __name__ == "__main__":
    main()
