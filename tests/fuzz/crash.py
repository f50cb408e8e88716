"""Kill saves at random moments: `python -m tests.fuzz.crash --kills 60`."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

import lobcq_fx
from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.atomic_folder import leftovers
from tests.fuzz.results import options, report

X = torch.ones(2, 256)


def main() -> None:
    given = options(__doc__, "kills", 60)
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        counts = crash(Path(folder) / "q", given.kills, given.seed)
    lost = counts["lost"] + counts["leftovers after the next save"]
    report("crash", tried=counts["kills"], lost=lost, record=given.record, leftovers=counts["leftovers"])


def crash(target: Path, kills: int, seed: int) -> Counter[str]:
    """Kill processes that save two models in turns; after each, one of the two must stand whole."""
    models = [quantized(seed) for seed in (0, 1)]
    results = [model(X) for model in models]
    models[0].save_pretrained(target)
    rng, counts = Random(seed), Counter({"kills": 0, "leftovers": 0, "lost": 0})
    for _ in range(kills):
        kill_a_save(models, target, after=rng.uniform(0, 0.3))
        counts["kills"] += 1
        counts["leftovers"] += len(leftovers(target))
        counts["lost"] += not stands(target, results)
        models[0].save_pretrained(target)
        counts["leftovers after the next save"] += len(leftovers(target))
    return counts


def quantized(seed: int) -> lobcq_fx.QuantizedModel:
    torch.manual_seed(seed)
    return lobcq_fx.quantize(nn.Linear(256, 1024).eval(), example_inputs=X)


def kill_a_save(models: Sequence[lobcq_fx.QuantizedModel], target: Path, after: float) -> None:
    child = os.fork()
    if child == 0:
        try:
            while True:
                for model in reversed(models):
                    model.save_pretrained(target)
        finally:
            os._exit(1)  # and not up into the caller, which would clear up for two
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise RuntimeError("a save failed by itself")


def stands(target: Path, results: Sequence[Tensor]) -> bool:
    try:
        found = lobcq_fx.load(target)(X)
    except CheckpointError:
        return False
    return any(torch.equal(found, result) for result in results)


if __name__ == "__main__":
    main()
