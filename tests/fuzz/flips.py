"""Flip bits of a saved folder's files, and load it: `python -m tests.fuzz.flips --flips 5000`."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import torch

import lobcq_fx
from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.checkpoint import FILES
from tests.fuzz.results import options, report
from tests.fuzz.small import X, quantized


def main() -> None:
    given = options(__doc__, "flips", 5000)
    model = quantized()
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path) / "q"
        model.save_pretrained(folder)
        counts = Counter[str]()
        for name in FILES:
            counts += flip(model, folder, name, given.flips // len(FILES), given.seed)
    lost = counts["another result"]
    report("flips", tried=counts.total(), lost=lost, record=given.record, refused=counts["refused"])


def flip(model: lobcq_fx.QuantizedModel, folder: Path, name: str, flips: int, seed: int) -> Counter[str]:
    """Damage one file that many times, by one bit or four, and put it back.

    A change is refused, or it was in what means nothing, as a blank in a header, and the result stays as it was.
    """
    expected, content, rng, counts = model(X), (folder / name).read_bytes(), Random(seed), Counter[str]()
    for _ in range(flips):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(damaged)
        try:
            same = torch.equal(lobcq_fx.load(folder)(X), expected)
        except CheckpointError:
            counts["refused"] += 1
        else:
            counts["the same result" if same else "another result"] += 1
    (folder / name).write_bytes(content)
    return counts


if __name__ == "__main__":
    main()
