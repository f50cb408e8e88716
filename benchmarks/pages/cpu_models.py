"""Tables of what benchmarks/model/generation.py wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages.markdown import table


def model_section(report: Mapping[str, Any]) -> str:
    """Each contender's speed and memory, and what was not run."""
    resident = {row["contender"]: row["used_mib"] for row in report["memory"]}
    first = {row["contender"]: row["first_token_seconds"] for row in report["memory"] if "first_token_seconds" in row}
    columns = columns_of(report)
    rows = [
        [
            row["contender"],
            str(row["threads"]),
            *(_speed_and_ratio(row, what) for what in columns),
            f"{resident[row['contender']] / 1024:.2f}",
            *([f"{first[row['contender']]:.1f}"] if first else []),
        ]
        for row in report["speed"]
    ]
    header = ["model", "threads", *columns.values(), "resident GiB", *(["first token, s"] if first else [])]
    parts = [table(header, rows)]
    absent = [f"{name} ({reason})" for name, reason in report.get("not_run", {}).items()]
    return "\n\n".join([*parts, *([f"Not run: {'; '.join(absent)}."] if absent else [])])


def columns_of(report: Mapping[str, Any]) -> dict[str, str]:
    """Titles by what results call it: loops written by hand, then plain `generate()` where it was measured."""
    longer, prompts = report.get("decode_from", [])[1:], report["prompts"]
    columns = {"decode": "decode, tokens/s"}
    columns |= {f"decode_{length}": f"decode behind {length}" for length in longer}
    columns |= {f"decode_batch_{batch}": f"decode, batch {batch}" for batch in report.get("batches", []) if batch > 1}
    columns |= {f"prefill_{length}": f"prompt of {length}" for length in prompts}
    if "generate_decode_ratio" in report["speed"][0]:
        columns["generate_decode"] = "decode by `generate()`"
        columns |= {f"generate_{length}_decode": f"behind {length}" for length in longer}
    return columns


def _speed_and_ratio(row: Mapping[str, Any], what: str) -> str:
    rate, ratio = (row.get(f"{what}_{end}") for end in ("tokens_per_second", "ratio"))
    return "-" if rate is None else f"{rate:.1f} ({ratio:.2f}x)"


def step_section(report: Mapping[str, Any]) -> str:
    """Where one decode step's milliseconds go."""
    steps = report["decode_step"]
    header = ["ms of one decode step", *(f"{step['contender']}, {step['threads']} threads" for step in steps)]
    rows = [[part, *(f"{step['parts_ms'][part]:.1f}" for step in steps)] for part in steps[0]["parts_ms"]]
    rows += [
        [title, *(f"{step[key]:.1f}" for step in steps)]
        for title, key in (("all, unprofiled", "step_ms"), ("to read what is read once", "floor_ms"))
    ]
    return table(header, rows)
