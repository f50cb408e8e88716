"""Put what benchmarks/cpu/experts.py measured into docs/passes.md, between its markers.

python -m benchmarks.pages.experts           # rewrite the page
python -m benchmarks.pages.experts --check   # exit with 1 if it differs
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pages.markdown import keep_page, table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "passes.md"
RESULT = ROOT / "benchmarks" / "results" / "experts.json"


def main() -> None:
    """Fill the page."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    keep_page(PAGE, {"experts": experts(found)}, "experts", __doc__)


def experts(found: dict[str, Any]) -> str:
    """One line for each kind of work, a column for each shape."""
    shapes = list(dict.fromkeys(row["N x K"] for row in found["rows"]))
    works = list(dict.fromkeys(row["work"] for row in found["rows"]))
    times = {(row["work"], row["N x K"]): f"{row['times']:.2f}" for row in found["rows"]}
    rows = [[work, *(times[work, shape] for shape in shapes)] for work in works]
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    return table(["grouped over dense", *shapes], rows) + f"\n\n{found['cpu']}, {threads}."


if __name__ == "__main__":
    main()
