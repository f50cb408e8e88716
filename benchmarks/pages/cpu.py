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
from benchmarks.pages.markdown import keep_page

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
    }
    keep_page(PAGE, parts, "cpu", __doc__)


def linears(name: str) -> str:
    """What benchmarks/cpu/linears.py wrote."""
    found = results(name)
    return cpu_section(found) if found else NOT_MEASURED


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
