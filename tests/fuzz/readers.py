"""Load a folder that another thread replaces all the time: `python -m tests.fuzz.readers --loads 1000`."""

from __future__ import annotations

import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from threading import Event

import torch

import lobcq_fx
from lobcq_fx.errors import CheckpointError
from tests.fuzz.results import options, report
from tests.fuzz.small import X, quantized


def main() -> None:
    given = options(__doc__, "loads", 1000)
    with tempfile.TemporaryDirectory() as folder:
        counts = read(Path(folder) / "q", given.loads)
    report("readers", tried=given.loads, lost=counts["a mixture"], record=given.record, saves=counts["saves"])


def read(target: Path, loads: int) -> Counter[str]:
    """Load while two models are saved in turns: what is loaded is one of them, or refused as being replaced."""
    models, counts, done = [quantized(seed) for seed in (0, 1)], Counter[str](), Event()
    results = [model(X) for model in models]
    models[0].save_pretrained(target)

    def save() -> None:
        for model in cycle(models):
            if done.is_set():
                return
            model.save_pretrained(target)
            counts["saves"] += 1

    with ThreadPoolExecutor(1) as threads:
        saving = threads.submit(save)
        for _ in range(loads):
            try:
                found = lobcq_fx.load(target)(X)
            except CheckpointError as error:
                counts["refused" if "was replaced" in str(error) else "a mixture"] += 1
            else:
                counts["one" if any(torch.equal(found, one) for one in results) else "a mixture"] += 1
        done.set()
        saving.result()
    return counts


if __name__ == "__main__":
    main()
