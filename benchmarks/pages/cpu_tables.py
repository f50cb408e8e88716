"""The README's section on the speed of a linear, from what benchmarks/cpu/linears.py wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.pages.markdown import table

SHOWN = "8x64"
"""The format that is compared with others' linears; the table of rates has every one."""

Run = Mapping[str, Any]
"""What was measured with one number of threads."""


def cpu_section(found: Mapping[str, Any]) -> str:
    """Two tables and what they were measured on."""
    runs = found["runs"]
    parts = [_made_on(runs), table(*_speedups(runs)), _LEGEND, table(*_rates(runs)), *_not_run(runs)]
    return "\n\n".join(parts)


_LEGEND = (
    "And the linear by itself, in every format: what it reads at M = 1, in GB/s and as a share of what a plain read"
    " reaches in the same race; 1e9 multiply-adds a second and thread at M = 512; the time to encode an activation, and"
    " 1e6 scalars a second and thread of a weight's encoding and of its repacking at load."
)


def _made_on(runs: list[Run]) -> str:
    machine, shapes = runs[0]["machine"], dict.fromkeys(row["shape"] for run in runs for row in run["results"])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"How many times as fast as others the {runs[0]['mode'].upper()} linear of format {SHOWN} is: the range over"
        f" N x K = {', '.join(shapes)}, {_per_run(_threads(run) for run in runs)}. {machine['cpu']}, instruction set"
        f" {machine['isa']}; {versions}:"
    )


def _speedups(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    peers = dict.fromkeys(peer for run in runs for row in run["results"] for peer in row["speedups"])
    measured = dict.fromkeys(row["rows"] for run in runs for row in run["results"])
    body = [[peer, *(_per_run(_speedup(run, peer, rows) for run in runs) for rows in measured)] for peer in peers]
    return ["compared with", *(f"M = {rows}" for rows in measured)], body


def _speedup(run: Run, peer: str, rows: int) -> str:
    return _range([row["speedups"][peer] for row in _of(run, SHOWN, rows) if peer in row["speedups"]], "x")


def _rates(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    header = ["format", "GB/s", "of a plain read", "GMAC/s a thread", "activation, ns a scalar", "weight", "repacking"]
    return header, [[name, *_rates_of(runs, name)] for name in runs[0]["encoding"]]


def _rates_of(runs: list[Run], name: str) -> Iterable[str]:
    yield _per_run(_range([row["gb_per_second"] for row in _of(run, name, 1)]) for run in runs)
    yield _per_run(_range([100 * row["read_share"] for row in _of(run, name, 1)], " %", digits=0) for run in runs)
    yield _per_run(
        _range([row["gmac_per_second"] / run["threads"] for row in _of(run, name, 512)], digits=0) for run in runs
    )
    yield _per_run(f"{run['encoding'][name]['activation_ns_per_scalar']:.2f}" for run in runs)
    for rate in ("weight_scalars_per_second", "repack_scalars_per_second"):
        yield _per_run(f"{run['encoding'][name][rate] / 1e6:.0f}" for run in runs)


def _not_run(runs: list[Run]) -> list[str]:
    lines = dict.fromkeys(f"{one['peer']} ({one['reason']})" for run in runs for one in run["not_run"])
    return [f"Not run: {'; '.join(lines)}."] if lines else []


def _of(run: Run, name: str, rows: int) -> list[dict[str, Any]]:
    """Results in a format with a number of rows."""
    return [row for row in run["results"] if (row["format"], row["rows"]) == (name, rows)]


def _threads(run: Run) -> str:
    return f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}"


def _per_run(cells: Iterable[str]) -> str:
    return " / ".join(cells)


def _range(values: list[float], unit: str = "", digits: int = 1) -> str:
    """Least to largest; "-" for none."""
    if not values:
        return "-"
    low, high = (f"{bound:.{digits}f}" for bound in (min(values), max(values)))
    return f"{low}{unit}" if low == high else f"{low}-{high}{unit}"
