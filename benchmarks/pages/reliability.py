"""Put what `make reliability` and `make differential` counted into docs/reliability.md, between its markers.

python -m benchmarks.pages.reliability           # rewrite the page
python -m benchmarks.pages.reliability --check   # exit with 1 if it differs
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pages.markdown import keep_page, table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "benchmarks" / "results"

TRIALS = {
    "crash": ("A save that is killed leaves the old model or the new one, whole.", "kills at random moments"),
    "streaming": (
        "A killed `quantize_folder` loses no more than was under way, and ends in the same bytes.",
        "kills, {calibrated} of them of calibrated work; {gone_on} left something to go on with",
    ),
    "faults": ("A save that the system fails leaves the old model or the new one.", "system calls, each failed once"),
    "readers": ("Who loads while another saves gets one of the models.", "loads beside a thread that saves"),
    "flips": ("What is damaged is refused, or computes what was saved.", "damaged files"),
    "loader": ("A folder that was made to deceive is refused, or is a model that runs.", "crafted folders"),
    "core": ("An op's wrong operands are refused; with right ones it gives the reference's result.", "calls"),
}
"""Each trial of tests/fuzz: what is promised, and what is counted; other counts of it stand in braces."""


def main() -> None:
    """Rewrite or check."""
    found = json.loads((RESULTS / "reliability.json").read_text(encoding="utf-8"))
    modules = json.loads((RESULTS / "differential.json").read_text(encoding="utf-8"))["counts"]
    rows = [
        [promise, f"[{name}](../tests/fuzz/{name}.py)", *tried(found.get(name), what)]
        for name, (promise, what) in TRIALS.items()
    ]
    calls = {"tried": modules["served"] + modules["refused"], "lost": modules.get("different modules", 0)}
    rows.append(
        [
            "A quantized model computes what the model does, at any size, or refuses the call.",
            "[differential](../tests/differential/__main__.py)",
            *tried(calls, f"calls of {modules['modules']:,} random modules"),
        ]
    )
    loading = json.loads((RESULTS / "loading.json").read_text(encoding="utf-8"))
    sections = {
        "reliability": table(["promise", "held by", "tried", "lost"], rows),
        "loading": cost_of_digests(loading),
    }
    keep_page(PAGE, sections, "reliability", __doc__)


def cost_of_digests(found: dict[str, Any]) -> str:
    """A sentence."""
    size, seconds = f"{found['weights']:,} weights ({found['bytes'] / 1e9:.1f} GB)", found["seconds"]
    return (
        f"Loading {size} from the system's cache, with {found['threads']} threads, takes {found['ratio']['median']:.2f}"
        " times as long with all digests compared as without (`python -m benchmarks.model.loading`, the median of"
        f" interleaved pairs: {seconds['verify']:.2f} s and {seconds['no verify']:.2f} s)."
    )


def tried(counts: dict[str, Any] | None, what: str) -> tuple[str, str]:
    """Two cells."""
    if counts is None:
        return "not measured", ""
    return f"{counts['tried']:,} {what.format(**counts)}", f"{counts['lost']:,}"


if __name__ == "__main__":
    main()
