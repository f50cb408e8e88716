"""Put what benchmarks/quality/minilm_similarity.py measured into docs/accuracy.md, between its markers.

python -m benchmarks.pages.accuracy           # rewrite the page
python -m benchmarks.pages.accuracy --check   # exit with 1 if it differs
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pages.markdown import keep_page, table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "accuracy.md"
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    """Rewrite or check."""
    found = json.loads((RESULTS / "minilm_similarity.json").read_text(encoding="utf-8"))
    keep_page(PAGE, {"minilm": encoder(found)}, "accuracy", __doc__)


def encoder(found: dict[str, Any]) -> str:
    """One line for each way to quantize all-MiniLM-L6-v2."""
    rows = [
        [
            row["format"],
            f"{row['bits_per_scalar']:g}",
            row["operands"],
            row.get("recipe", "to the nearest"),
            f"{1 - row['mean_cosine']:.4f}",
        ]
        for row in found["rows"]
    ]
    return table(["format", "bits", "weights / activations", "recipe", "1 - mean cosine"], rows)


if __name__ == "__main__":
    main()
