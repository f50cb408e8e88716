"""Put what benchmarks/scale/streaming.py measured into docs/scaling.md, between its markers.

python -m benchmarks.pages.scaling           # rewrite the page
python -m benchmarks.pages.scaling --check   # exit with 1 if it differs
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pages.markdown import keep_page, table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling.md"
RESULT = ROOT / "benchmarks" / "results" / "streaming.json"

DEFAULT = "16"
"""Gigabytes that the script makes if it is not told otherwise."""

HEADER = ["float model", "packed", "largest tensor", "way", "peak, GiB", "processor time, s"]


def main() -> None:
    """Fill the page."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    keep_page(PAGE, {"streaming": streaming(found)}, "scaling", __doc__)


def streaming(found: dict[str, Any]) -> str:
    """A row for each size and way."""
    rows = [row for size in sorted({*found["sizes"], DEFAULT}, key=float) for row in of_size(size, found["sizes"])]
    threads = sorted({one["threads"] for one in found["sizes"].values()})
    return (
        f"{found['machine']['cpu']}, {' or '.join(map(str, threads))} thread(s), torch"
        f" {found['machine']['versions']['torch']}, transformers {found['transformers']}. The peak is the process's, of"
        f" which {imported(found):.2f} GiB are Python and its modules:\n\n{table(HEADER, rows)}"
    )


def of_size(size: str, sizes: dict[str, Any]) -> list[list[str]]:
    """The rows of one size."""
    if size not in sizes:
        return [[f"{size} GB", *["not measured"] * (len(HEADER) - 1)]]
    one = sizes[size]
    shape = [f"{one[name]:.2f} GiB" for name in ("float_gib", "packed_gib", "largest_tensor_gib")]
    return [
        [*shape, _titled(way, found), f"{found['peak_gib']:.2f}", f"{found['processor_seconds']:.0f}"]
        for way, found in one["ways"].items()
    ]


def _titled(way: str, found: dict[str, Any]) -> str:
    """Of several processes the clock's time tells more than the processors'."""
    return f"{way}, {found['seconds']:.0f} s on the clock" if "processes" in way else way


def imported(found: dict[str, Any]) -> float:
    """GiB of a process that has done nothing yet, at most."""
    return max(way["imported_gib"] for one in found["sizes"].values() for way in one["ways"].values())


if __name__ == "__main__":
    main()
