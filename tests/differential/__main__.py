"""Run many random modules: `python -m tests.differential --modules 20000 --seed 0 --out build/differential.json`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from tests.differential.compare import DifferentError, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/differential.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    failures = []
    start = time.monotonic()
    for seed in range(options.seed, options.seed + options.modules):
        try:
            counts += compare(seed)
        except Exception as error:
            counts["modules"] += 1
            kind = "different modules" if isinstance(error, DifferentError) else "broken modules"
            counts[kind] += 1
            failures.append(f"seed {seed}: {type(error).__name__}: {error}")
            sys.stdout.write(failures[-1][:600] + "\n")
        if seed % 20 == 0 or seed == options.seed + options.modules - 1:
            result = {"seed": options.seed, "seconds": round(time.monotonic() - start, 1)}
            options.out.write_text(
                json.dumps({**result, "counts": dict(counts), "failures": failures}, indent=1) + "\n"
            )
            torch._dynamo.reset()
    for name, count in sorted(counts.items()):
        sys.stdout.write(f"{count:8} {name}\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
