"""Keeps how often a promise was tried, for docs/reliability.md."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability.json"


def options(description: str | None, what: str, number: int) -> argparse.Namespace:
    """`--WHAT NUMBER --seed N --record` of a script that tries a promise."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument(f"--{what}", type=int, default=number)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help=f"write the counts into {RESULTS.name}")
    return parser.parse_args()


def report(trial: str, *, tried: int, lost: int, record: bool, **more: int) -> None:
    """Print the counts of a trial, keep them if asked to, and end the process: 1 if anything was lost."""
    counts = {"tried": tried, "lost": lost, **more}
    sys.stdout.write(json.dumps({trial: counts}, indent=1) + "\n")
    if record:
        found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        found[trial] = counts | {"torch": version("torch")}
        RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if lost else 0)
