"""Run many random modules, and write what became of them: `python -m tests.differential --modules 20000`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from tests.differential.chunks import prepare, run

CHUNK = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0, help="of the first module; the next has the next one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/differential.json"))
    parser.add_argument("--resume", action="store_true", help="go on after the modules that the file already counts")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    failures: list[str] = []
    operators: set[str] = set()
    if options.resume and options.out.exists():
        before = json.loads(options.out.read_text(encoding="utf-8"))
        counts, failures, operators = Counter(before["counts"]), before["failures"], set(before["operators"])
    first, end = options.seed + counts["modules"], options.seed + options.modules
    chunks = [range(seed, min(seed + CHUNK, end)) for seed in range(first, end, CHUNK)]
    # Not a ProcessPoolExecutor: until Python 3.12 that may wait forever once a worker has done its last task.
    with get_context("spawn").Pool(options.jobs, initializer=prepare, maxtasksperchild=50) as pool:
        for found, failed in pool.imap(run, chunks):
            counts += found.counts
            operators |= found.operators
            failures += failed
            for failure in failed:
                sys.stdout.write(failure[:600] + "\n")
            result = {
                "versions": {package: version(package) for package in ("torch",)},
                "seed": options.seed,
                "counts": dict(sorted(counts.items())),
                "failures": failures,
                "operators": sorted(operators),
            }
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, count in sorted(counts.items()):
        sys.stdout.write(f"{count:8} {name}\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
