"""What becomes of every family of transformers: `python -m benchmarks.quality.families`, or of those that are named.

Each is a tiny model of random weights (tests/more_families.py). It is quantized, compared with the float model whose
linears are fake-quantized, saved and loaded, compiled, and exported to ONNX and run there; what fails is written down
with its reason, and the next one follows. Results are written after each family into
benchmarks/results/families.json, beside what that has of others; `python -m benchmarks.pages.families` shows them.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import lobcq_fx
from lobcq_fx.storage.graph_json import operators
from tests.more_families import FAMILIES, REFUSED, Family, agreement
from tests.vision_language import VISION_LANGUAGE

RESULT = Path(__file__).parents[1] / "results" / "families.json"
COMPILED_TOLERANCE = 1e-3
"""In norm: decomposed operators round otherwise, which here and there moves a scalar to another code."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; none means all")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    every = {**FAMILIES, **VISION_LANGUAGE, **REFUSED}
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {"families": {}}
    for name in arguments.families or every:
        found["families"][name] = row = measure(every[name])
        found["versions"] = {package: version(package) for package in ("torch", "transformers", "onnxruntime")}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(row), flush=True)


def measure(family: Family) -> dict[str, Any]:
    """One family's row; `refused` alone where it cannot be quantized."""
    row: dict[str, Any] = {"kind": type(family).__name__}
    model = family.model()
    try:
        q = family.quantized(model)
    except lobcq_fx.LobcqError as error:
        return {**row, "refused": first_line(error)}
    except Exception as error:  # nothing but a LobcqError should come: it is written down as what it is
        return {**row, "refused": f"{type(error).__name__}: {first_line(error)}"}
    found = agreement(family, model, q)
    row |= {"coverage": q.inventory.mac_coverage, "median": found.median, "largest": max(found.largest, found.by_steps)}
    row["operators"] = sorted(frozenset().union(*(operators(one.stored) for one in q.graphs.values())))
    checks = {"saved": saved, "compiled": compiled, "exported": exported}
    return row | {name: outcome(check, family, model, q) for name, check in checks.items()}


def outcome(check: Callable[..., bool], *operands: Any) -> str:
    """Yes, differs, or the reason why not."""
    try:
        return "yes" if check(*operands) else "differs"
    except Exception as error:  # whatever a family stumbles over is a row of the table, not the end of the run
        return first_line(error)


def first_line(error: Exception) -> str:
    """What it says in a line, without paths of this machine."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return " ".join(word.rsplit("site-packages/", 1)[-1] for word in line.split())


@torch.no_grad()
def saved(family: Family, model: transformers.PreTrainedModel, q: lobcq_fx.QuantizedModel) -> bool:
    """Whether a loaded model gives the same bits."""
    call = family.call(model)
    with tempfile.TemporaryDirectory() as folder:
        q.save_pretrained(Path(folder) / "q")
        loaded = lobcq_fx.load(Path(folder) / "q")
        return torch.equal(family.results(loaded, call), family.results(q, call))


@torch.no_grad()
def compiled(family: Family, model: transformers.PreTrainedModel, q: lobcq_fx.QuantizedModel) -> bool:
    """Whether torch.compile captures it whole, to the same results; Inductor is left out for its time."""
    call = family.call(model)
    torch._dynamo.reset()
    actual = family.results(torch.compile(q, fullgraph=True, dynamic=True, backend="aot_eager"), call)
    expected = family.results(q, call)
    return bool((actual - expected).norm() < COMPILED_TOLERANCE * expected.norm())


def exported(family: Family, model: transformers.PreTrainedModel, q: lobcq_fx.QuantizedModel) -> bool:
    """Whether it exports to ONNX, which compares every output in ONNX Runtime with the torch model."""
    call = family.call(model)
    example = None if "input_ids" in call else {name: value[:2] for name, value in call.items()}
    with tempfile.TemporaryDirectory() as folder:
        lobcq_fx.export_onnx(q, Path(folder) / "exported", example)
    return True


if __name__ == "__main__":
    main()
