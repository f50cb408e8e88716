"""Run with faults.c preloaded: every call that a save makes fails once, in turn. Writes what happened, as JSON."""

from __future__ import annotations

import ctypes
import errno
import json
import sys
from itertools import count
from pathlib import Path

import torch

import lobcq_fx
from lobcq_fx.errors import LobcqError
from lobcq_fx.storage.atomic_folder import leftovers
from tests.fuzz.small import X, quantized


def main(target: Path, output: Path) -> None:
    library = ctypes.CDLL(None)
    library.lobcq_failed.restype = ctypes.c_char_p
    models = [quantized(seed) for seed in (0, 1)]
    results = [model(X) for model in models]
    models[0].save_pretrained(target)
    (target / "notes.txt").write_text("mine")
    standing, faults = 0, []
    for number in count():
        raised = ""
        library.lobcq_fail_at(ctypes.c_long(number), errno.EIO)
        try:
            models[1 - standing].save_pretrained(target)
        except (OSError, LobcqError) as error:
            raised = str(error)
        finally:
            failed = library.lobcq_failed()
        if failed is None:
            break
        found = lobcq_fx.load(target)(X)
        after = next((which for which, result in enumerate(results) if torch.equal(found, result)), None)
        notes = (target / "notes.txt").read_text()
        faults.append({"failed": failed.decode(), "raised": raised, "before": standing, "after": after, "notes": notes})
        assert after is not None, faults[-1]
        standing = after
    models[1 - standing].save_pretrained(target)
    assert torch.equal(lobcq_fx.load(target)(X), results[1 - standing])
    output.write_text(json.dumps({"faults": faults, "left": [str(path) for path in leftovers(target)]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
