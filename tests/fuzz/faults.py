"""Let every call to the system that a save makes fail once: `python -m tests.fuzz.faults`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.fuzz.results import options, report

HERE = Path(__file__).parent
COMPILER = shutil.which("gcc") or shutil.which("cc")


def main() -> None:
    given = options(__doc__, "rounds", 1)
    with tempfile.TemporaryDirectory() as folder:
        rounds = [failing_saves(Path(folder)) for _ in range(given.rounds)]
    faults = [fault for found in rounds for fault in found["faults"]]
    lost = sum(fault["after"] is None or fault["notes"] != "mine" for fault in faults)
    report("faults", tried=len(faults), lost=lost + sum(len(found["left"]) for found in rounds), record=given.record)


def failing_saves(folder: Path) -> dict[str, Any]:
    """What failing_saves.py found, in a process whose calls to the system fail as it wishes (Linux, a C compiler)."""
    library, output = folder / "faults.so", folder / "found.json"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    subprocess.run(
        [sys.executable, "-m", "tests.fuzz.failing_saves", folder / "saved" / "q", output],
        cwd=HERE.parents[1],
        env={**os.environ, "LD_PRELOAD": str(library)},
        check=True,
    )
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
