"""Put what the scripts of benchmarks/scale measured into docs/scaling.md, between its markers.

python -m benchmarks.pages.scaling           # rewrite the page
python -m benchmarks.pages.scaling --check   # exit with 1 if it differs
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.pages.markdown import keep_page, table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"

DEFAULT = "16"
"""Gigabytes that the script makes if it is not told otherwise."""

HEADER = ["float model", "packed", "largest tensor", "way", "peak, GiB", "processor time, s", "processor"]


def main() -> None:
    """Fill the page."""
    found, traced, simulated = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("streaming", "tracing", "plan")
    )
    parts = {
        "streaming": streaming(found), "steps": steps(found), "alone": alone(found),
        "loading": loading(found), "tracing": tracing(traced), "plan": plan(simulated),
    }  # fmt: skip
    keep_page(PAGE, parts, "scaling", __doc__)


def streaming(found: dict[str, Any]) -> str:
    """A row for each size and way."""
    rows = [row for size in sorted({*found["sizes"], DEFAULT}, key=float) for row in of_size(size, found["sizes"])]
    threads = sorted({one["threads"] for one in found["sizes"].values()})
    return (
        f"{' or '.join(map(str, threads))} thread(s), torch"
        f" {found['machine']['versions']['torch']}, transformers {found['transformers']}. The peak is the process's, of"
        f" which {imported(found):.2f} GiB are Python and its modules:\n\n{table(HEADER, rows)}"
    )


STEPS = {"load": "stand-ins", "trace": "graphs", "encode": "weights", "save": "reading back"}
"""What happens in each, as the page calls it."""


def steps(found: dict[str, Any]) -> str:
    """Processor seconds of each step, of each size of which they are known."""
    rows = []
    for size in sorted(found["sizes"], key=float):
        one = found["sizes"][size]
        after = one["ways"]["streamed"].get("processor_seconds_after")
        if after:
            ends = [0.0, *(after[step] for step in STEPS)]
            taken = [end - begin for begin, end in pairwise(ends)]
            rows.append([f"{one['float_gib']:.2f} GiB", *(f"{value:.0f}" for value in taken)])
    return table(["float model", *(f"{title}, s" for title in STEPS.values())], rows) if rows else "Not measured."


def alone(found: dict[str, Any]) -> str:
    """Of each size the weights' step beside what reading and encoding take alone, and the share of the slower one."""
    rows = []
    for size in sorted(found["sizes"], key=float):
        one = found["sizes"][size]
        way = one["ways"]["streamed"]
        if "alone" in one and "seconds_after" in way:
            for kind, title in (("processor_seconds", "processor"), ("seconds", "clock")):
                after, parts = way[f"{kind}_after"], [one["alone"][part][kind] for part in ("reading", "encoding")]
                step = after["encode"] - after["trace"]
                share = f"{100 * max(parts) / step:.0f} %"
                seconds = (f"{value:.1f}" for value in (*parts, step))
                rows.append([f"{one['float_gib']:.2f} GiB", title, *seconds, share, way["cpu"]])
    header = ["float model", "time", "reading alone, s", "encoding alone, s", "weights, s", "share", "processor"]
    return table(header, rows) if rows else "Not measured."


def loading(found: dict[str, Any]) -> str:
    """What loading takes, of each size that was loaded."""
    rows = []
    for size in sorted(found["sizes"], key=float):
        one = found["sizes"][size]
        if "loading" in one:
            peak = one["loading"]["peak_gib"] - one["loading"]["imported_gib"]
            shares = f"{peak:.2f} GiB, {peak / one['packed_gib']:.2f} times"
            seconds = f"{one['loading']['processor_seconds']:.0f}"
            rows.append([f"{one['packed_gib']:.2f} GiB", shares, seconds, one["loading"]["cpu"]])
    header = ["packed", "peak of `load`, above the modules", "processor time, s", "processor"]
    return table(header, rows) if rows else "Not measured."


def tracing(found: dict[str, Any]) -> str:
    """Seconds by layers."""
    names = ("growing_seconds", "both_seconds", "repeated_seconds")
    rows = [
        [str(row["layers"]), *("-" if row[name] is None else f"{row[name]:.1f}" for name in names)]
        for row in found["rows"]
    ]
    versions = f"torch {found['machine']['versions']['torch']}, transformers {found['transformers']}"
    header = ["layers", "all layers, growing caches, s", "and static ones, s", "both, of three layers, s"]
    other = found.get("repeated_machine", found["machine"])["cpu"]
    if other != found["machine"]["cpu"]:
        header[-1] += f" ({other})"
    return f"{found['machine']['cpu']}, 1 thread, {versions}, processor time:\n\n{table(header, rows)}"


def plan(found: dict[str, Any]) -> str:
    """What larger models would take, and how far the simulation is off where it was checked."""
    ranks = list(found["rows"][0]["hours"])
    header = ["planned", "float model", "packed", "memory of a rank", *(f"{one} thread(s), hours" for one in ranks)]
    rows = [
        [
            row["model"],
            *(f"{row[name]:.0f} GiB" for name in ("float_gib", "packed_gib", "memory_gib")),
            *(f"{hours:.2f}" for hours in row["hours"].values()),
        ]
        for row in found["rows"]
    ]
    checks = [
        f"{one['gigabytes']} GB in {one['processes']} processes took {one['seconds']:.0f} s of processor time,"
        f" simulated {one['simulated_seconds']:.0f} s"
        for one in found["checked"]
    ]
    return f"{table(header, rows)}\n\nChecked: {'; '.join(checks) or 'not measured'}."


def of_size(size: str, sizes: dict[str, Any]) -> list[list[str]]:
    """The rows of one size."""
    if size not in sizes:
        return [[f"{size} GB", *["not measured"] * (len(HEADER) - 1)]]
    one = sizes[size]
    shape = [f"{one[name]:.2f} GiB" for name in ("float_gib", "packed_gib", "largest_tensor_gib")]
    return [
        [*shape, _titled(way, found), f"{found['peak_gib']:.2f}", f"{found['processor_seconds']:.0f}", found["cpu"]]
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
