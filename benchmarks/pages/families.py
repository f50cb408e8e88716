"""Put what benchmarks/quality/families.py and tests.differential found into docs/coverage.md, between its markers.

python -m benchmarks.pages.families           # rewrite the page
python -m benchmarks.pages.families --check   # exit with 1 if it differs
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.pages.markdown import keep_page, table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "coverage.md"
RESULTS = ROOT / "benchmarks" / "results"
KINDS = {
    "LanguageModel": "language model",
    "TextEncoder": "text encoder",
    "EncoderOfOwnSizes": "text encoder",
    "EncoderOfTwoParts": "text encoder",
    "ImageEncoder": "image encoder",
    "SpeechEncoder": "speech encoder",
    "EncoderDecoder": "encoder-decoder",
    "Transcriber": "encoder-decoder of speech",
    "VisionLanguage": "vision-language model",
    "TypedTokens": "vision-language model",
    "TypedPrefix": "vision-language model",
    "Tiles": "vision-language model",
    "Patches": "vision-language model",
}
CHECKS = ("saved", "compiled", "exported")


def main() -> None:
    """Rewrite or check."""
    found, modules = (
        json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in ("families.json", "differential.json")
    )
    rows = dict(sorted(found["families"].items(), key=lambda item: (KINDS[item[1]["kind"]], item[0])))
    keep_page(
        PAGE,
        {
            "families": served(rows, found["versions"]),
            "failures": failures(rows),
            "refused": refused(rows),
            "random": random_modules(modules),
        },
        "families",
        __doc__,
    )


def served(rows: dict[str, dict[str, Any]], versions: dict[str, str]) -> str:
    """One line for each family that is quantized."""
    header = ["family", "kind", "multiply-adds quantized", "median", "largest", "save, load", "compile", "ONNX"]
    lines = [
        [
            f"`{name}`",
            KINDS[row["kind"]],
            f"{row['coverage']:.0%}",
            *(f"{row[key]:.0e}" for key in ("median", "largest")),
            *("yes" if row[check] == "yes" else "**no**" for check in CHECKS),
        ]
        for name, row in rows.items()
        if "refused" not in row
    ]
    made_with = ", ".join(f"{package} {version}" for package, version in versions.items())
    return f"{len(lines)} families, {made_with}:\n\n{table(header, lines)}"


def failures(rows: dict[str, dict[str, Any]]) -> str:
    """Why there is a "no" above."""
    lines = [
        [f"`{name}`", check, cell(row[check])]
        for name, row in rows.items()
        for check in CHECKS
        if row.get(check, "yes") != "yes"
    ]
    return table(["family", "not", "because"], lines) if lines else "None."


def refused(rows: dict[str, dict[str, Any]]) -> str:
    """Families that are not quantized."""
    return table(
        ["family", "because"],
        [[f"`{name}`", cell(row["refused"])] for name, row in rows.items() if "refused" in row],
    )


def random_modules(found: dict[str, Any]) -> str:
    """What became of the random modules and of their calls."""
    counts = Counter(found["counts"])
    rows = {
        "modules": counts["modules"],
        "not quantized, with an error that says why": counts["refused_modules"],
        "that gave another result, or an error of another kind": counts["different modules"] + counts["broken modules"],
        "calls that gave the module's result": counts["served"],
        "calls refused with a CallError": counts["refused"],
        "calls on which both fail": counts["failed, as the model does"] + counts["refused, as the model does"],
    }
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    lines = [[what, f"{count:,}"] for what, count in rows.items()]
    return f"Seeds from {found['seed']}, {versions}:\n\n{table(['', 'count'], lines)}"


def cell(reason: str) -> str:
    """A reason, without its remedy, that breaks no table."""
    return reason.partition(" Remedy:")[0].replace("|", "\\|")


if __name__ == "__main__":
    main()
