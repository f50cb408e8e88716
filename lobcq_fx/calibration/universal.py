"""Fits the universal codebooks shipped with the format: `python -m lobcq_fx.calibration.universal`.

One set for each N_c serves weights and activations and every array size. It is fitted to a seeded mixture of
distributions, so anyone can reproduce the data file bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from lobcq_fx.calibration.fit import fit_codebooks
from lobcq_fx.calibration.refine import refine_codebooks
from lobcq_fx.calibration.synthetic import SOURCES, Source, synthetic
from lobcq_fx.format import FormatSpec, absmax_tensor_scale, decode, encode
from lobcq_fx.format.spec import ALLOWED_NUM_CODEBOOKS
from lobcq_fx.format.universal import DATA_FILE

COMMAND = "python -m lobcq_fx.calibration.universal"


@dataclass(frozen=True)
class Recipe:
    """Everything the universal codebooks depend on.

    scalars: of each source, for the fit; and for judging, drawn with other seeds.
    refine_scalars: of each source, for the integer refinement.
    array_size: L_A of the blocks.
    mixtures: shares of the sources in the fit, each tried.
    restarts: k-means++ starts for each mixture.
    """

    scalars: int = 1 << 19
    refine_scalars: int = 1 << 18
    array_size: int = 64
    mixtures: tuple[tuple[float, ...], ...] = ((1.0, 1.0, 1.0), (1.0, 0.5, 1.0), (1.0, 0.5, 0.5))
    restarts: int = 4
    seed: int = 20251123


@dataclass(frozen=True)
class UniversalSet:
    """One universal set and how it was judged.

    codebooks: int8 [N_c, 16].
    sqnr_db: of each source, round to nearest with the weight rule.
    loss_db: what each source loses against a set fitted and refined on it alone.
    """

    codebooks: Tensor
    mixture: tuple[float, ...]
    fit_seed: int
    fit_mse: float
    sqnr_db: dict[Source, float]
    loss_db: dict[Source, float]

    @property
    def worst_loss_db(self) -> float:
        """The criterion: what the source served worst loses."""
        return max(self.loss_db.values())


def sqnr_db(arrays: Tensor, spec: FormatSpec, codebooks: Tensor) -> float:
    """Signal to quantization noise of encode and decode under the weight rule, in dB; arrays [n, L_A]."""
    noise = (decode(encode(arrays, spec, codebooks)) - arrays).double().square().sum()
    return 10 * math.log10(float(arrays.double().square().sum() / noise))


def fit_universal(num_codebooks: int, recipe: Recipe, progress: Progress | None = None) -> UniversalSet:
    """Fit, refine and judge one set for each mixture and restart; the least worst loss wins."""
    spec = FormatSpec(num_codebooks, recipe.array_size)
    fitting = _operands(recipe.scalars, recipe, stream=0)
    judging = _operands(recipe.scalars, recipe, stream=1)
    samples = [arrays[: recipe.refine_scalars // recipe.array_size] for arrays in fitting]
    own = [
        sqnr_db(held_out, spec, refine_codebooks(fit_codebooks(arrays, spec, seed=recipe.seed).codebooks, [sample]))
        for arrays, sample, held_out in zip(fitting, samples, judging, strict=True)
    ]
    candidates = []
    starts = [(mixture, recipe.seed + i) for mixture in recipe.mixtures for i in range(recipe.restarts)]
    task = progress.add_task(f"N_c = {num_codebooks}", total=len(starts)) if progress is not None else None
    for mixture, seed in starts:
        fit = fit_codebooks(_mix(fitting, mixture), spec, tensor_scale=torch.tensor(1.0), seed=seed)
        codebooks = refine_codebooks(fit.codebooks, samples, targets=own)
        sqnr = {source: sqnr_db(arrays, spec, codebooks) for source, arrays in zip(SOURCES, judging, strict=True)}
        loss = {source: best - sqnr[source] for source, best in zip(SOURCES, own, strict=True)}
        candidates.append(UniversalSet(codebooks, mixture, seed, fit.mse_history[-1], sqnr, loss))
        if progress is not None and task is not None:
            progress.advance(task)
    return min(candidates, key=lambda candidate: candidate.worst_loss_db)


def universal_document(recipe: Recipe, sets: dict[int, UniversalSet]) -> dict[str, Any]:
    """The data file's content: the codebooks and their provenance."""
    fits = {
        str(n): {
            "mixture": dict(zip(SOURCES, found.mixture, strict=True)),
            "fit_seed": found.fit_seed,
            "fit_mse": round(found.fit_mse, 6),
            "sqnr_db": {source: round(value, 3) for source, value in found.sqnr_db.items()},
            "loss_to_own_set_db": {source: round(value, 3) for source, value in found.loss_db.items()},
        }
        for n, found in sets.items()
    }
    return {
        "provenance": {
            "command": COMMAND,
            "sources": list(SOURCES),
            "source_module": "lobcq_fx/calibration/synthetic.py",
            "recipe": asdict(recipe),
            "units": "fit_mse in squared INT6 steps; sqnr_db with the weight rule on data of another seed",
            "fits": fits,
        },
        "codebooks": {str(n): found.codebooks.tolist() for n, found in sets.items()},
    }


def main() -> None:
    """Fit every set and write the data file."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Fit the universal codebooks and write their data file.")
    default = Path(__file__).parent.parent / "format" / DATA_FILE
    parser.add_argument("--out", type=Path, default=default, help="the JSON file to write (default: the shipped one)")
    arguments = parser.parse_args()
    recipe = Recipe()
    console = Console()
    with Progress(console=console) as progress:
        sets = {n: fit_universal(n, recipe, progress) for n in ALLOWED_NUM_CODEBOOKS}
    for n, found in sets.items():
        console.print(f"N_c = {n}: SQNR {_in_db(found.sqnr_db)}; below own sets {_in_db(found.loss_db)}")
    arguments.out.write_text(_as_json(universal_document(recipe, sets)), encoding="utf-8")
    console.print(f"wrote {arguments.out}")


def _operands(scalars: int, recipe: Recipe, stream: int) -> list[Tensor]:
    """Block arrays of each source, [scalars / L_A, L_A]; streams have seeds of their own."""
    shape = (scalars // recipe.array_size, recipe.array_size)
    first = recipe.seed + 1000 * (stream + 1)
    return [synthetic(source, shape, first + i) for i, source in enumerate(SOURCES)]


def _mix(operands: list[Tensor], mixture: tuple[float, ...]) -> Tensor:
    """The share of each operand's arrays, each in units of its own tensor scale: [n, L_A]."""
    largest = max(mixture)
    parts = zip(operands, mixture, strict=True)
    return torch.cat([x[: int(len(x) * share / largest)] / absmax_tensor_scale(x) for x, share in parts])


def _in_db(values: dict[Source, float]) -> str:
    return ", ".join(f"{source} {value:.2f}" for source, value in values.items()) + " dB"


def _as_json(document: dict[str, Any]) -> str:
    """Indented JSON with each codebook on one line."""
    lines = json.dumps({**document, "codebooks": None}, indent=2)
    sets = [
        f'    "{n}": [\n' + ",\n".join(f"      {row}" for row in rows) + "\n    ]"
        for n, rows in document["codebooks"].items()
    ]
    return lines.replace('"codebooks": null', '"codebooks": {\n' + ",\n".join(sets) + "\n  }") + "\n"


if __name__ == "__main__":
    main()
