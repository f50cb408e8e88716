"""Fits the universal codebooks shipped with the format: `python -m lobcq_fx.calibration.universal`.

One set for each N_c serves weights and activations and every array size. It is fitted to seeded synthetic data, so
anyone can reproduce the data file, in about 7 minutes on one core. A fit to the mixture of all sources ends in local
optima that serve one source at another's cost; so the codebooks of many fits, to each source and to mixtures, go into a
pool, from which the set is chosen that loses least on the source it serves worst, and then refined.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from lobcq_fx.calibration.fit import CodebookFit, fit_codebooks
from lobcq_fx.calibration.refine import refine_codebooks
from lobcq_fx.calibration.selection import select_codebooks
from lobcq_fx.calibration.synthetic import SOURCES, Source, synthetic
from lobcq_fx.format import FormatSpec, absmax_tensor_scale, decode, encode
from lobcq_fx.format.spec import ALLOWED_NUM_CODEBOOKS
from lobcq_fx.format.universal import DATA_FILE

DEFAULT_ARRAY_SIZE = FormatSpec().array_size

COMMAND = "python -m lobcq_fx.calibration.universal"


@dataclass(frozen=True)
class Recipe:
    """Everything the universal codebooks depend on.

    fit_scalars: of each source, for every fit; the mixtures take their shares of these.
    refine_scalars: the first of those, for choosing and refining.
    judge_scalars: of each source, with another seed, for the figures in the data file.
    array_sizes: L_A; each is fitted, and counts as data of its own.
    mixtures: shares of the sources in fits to a mixture.
    restarts: k-means++ starts of each fit.
    tolerance: of each fit.
    slack_db: what an array size other than the default's may lose more than it.
    """

    fit_scalars: int = 1 << 19
    refine_scalars: int = 1 << 18
    judge_scalars: int = 1 << 19
    array_sizes: tuple[int, ...] = (32, 64, 128)
    mixtures: tuple[tuple[float, ...], ...] = ((1.0, 1.0, 1.0), (1.0, 0.5, 1.0), (1.0, 0.0, 1.0))
    restarts: int = 3
    tolerance: float = 3e-4
    slack_db: float = 0.15
    seed: int = 20251123

    @property
    def num_fits(self) -> int:
        """Fits made for each N_c."""
        return self.restarts * len(self.array_sizes) * (len(SOURCES) + len(self.mixtures))


@dataclass(frozen=True)
class Judgement:
    """A universal set on data it was not fitted to.

    sqnr_db: round to nearest with the weight rule.
    loss_db: how far that is below the best set fitted and refined on this source and array size alone.
    """

    source: Source
    array_size: int
    sqnr_db: float
    loss_db: float


@dataclass(frozen=True)
class UniversalSet:
    """codebooks: int8 [N_c, 16], and how they do on every source and array size."""

    codebooks: Tensor
    judgements: tuple[Judgement, ...]


@dataclass(frozen=True)
class _Operand:
    """One source at one array size: arrays [n, L_A] to fit on, to refine on, to judge with."""

    source: Source
    spec: FormatSpec
    fitting: Tensor
    refining: Tensor
    judging: Tensor


def sqnr_db(arrays: Tensor, spec: FormatSpec, codebooks: Tensor) -> float:
    """Signal to quantization noise of encode and decode under the weight rule, in dB; arrays [n, K]."""
    noise = (decode(encode(arrays, spec, codebooks)) - arrays).double().square().sum()
    return 10 * math.log10(float(arrays.double().square().sum() / noise))


def fit_universal(
    num_codebooks: int, recipe: Recipe, on_fit: Callable[[CodebookFit], None] | None = None
) -> UniversalSet:
    """Fit, pool, choose and refine one universal set; `on_fit` hears of each of the `recipe.num_fits` fits."""
    operands = _operands(num_codebooks, recipe)
    pool: list[Tensor] = []

    def fit(arrays: Tensor, spec: FormatSpec, restart: int) -> Tensor:
        unscaled = torch.ones((), dtype=torch.float32, device="cpu")
        seed = recipe.seed + restart
        found = fit_codebooks(arrays, spec, tensor_scale=unscaled, tolerance=recipe.tolerance, seed=seed)
        if on_fit is not None:
            on_fit(found)
        return found.codebooks

    own = []
    for operand in operands:
        arrays = operand.fitting / absmax_tensor_scale(operand.fitting)
        fitted = [fit(arrays, operand.spec, restart) for restart in range(recipe.restarts)]
        refined = [refine_codebooks(codebooks, [operand.refining]) for codebooks in fitted]
        pool += refined
        own.append(max(refined, key=lambda codebooks: sqnr_db(operand.refining, operand.spec, codebooks)))
    for size, mixture in itertools.product(recipe.array_sizes, recipe.mixtures):
        spec = FormatSpec(num_codebooks, size)
        arrays = _mix([operand.fitting for operand in operands if operand.spec == spec], mixture)
        for restart in range(recipe.restarts):
            pool.append(fit(arrays, spec, restart))
    targets = [
        sqnr_db(x.refining, x.spec, codebooks) - (recipe.slack_db if x.spec.array_size != DEFAULT_ARRAY_SIZE else 0.0)
        for x, codebooks in zip(operands, own, strict=True)
    ]
    samples = [operand.refining for operand in operands]
    chosen = select_codebooks(torch.unique(torch.cat(pool), dim=0), num_codebooks, samples, targets)
    codebooks = refine_codebooks(chosen, samples, targets)
    return UniversalSet(codebooks, tuple(_judge(x, codebooks, best) for x, best in zip(operands, own, strict=True)))


def universal_document(recipe: Recipe, sets: dict[int, UniversalSet]) -> dict[str, Any]:
    """The data file's content: the codebooks and where they come from."""
    return {
        "provenance": {
            "command": COMMAND,
            "data": f"synthetic, seeded: {', '.join(SOURCES)} (lobcq_fx/calibration/synthetic.py)",
            "recipe": asdict(recipe),
            "judged": {str(n): [asdict(judgement) for judgement in found.judgements] for n, found in sets.items()},
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
    sets = {}
    with Progress(console=console) as progress:
        for n in ALLOWED_NUM_CODEBOOKS:
            task = progress.add_task(f"N_c = {n}", total=recipe.num_fits)
            sets[n] = fit_universal(n, recipe, on_fit=lambda _, task=task: progress.advance(task))  # type: ignore[misc]
    for n, found in sets.items():
        for judgement in found.judgements:
            console.print(
                f"{n}x{judgement.array_size} {judgement.source}: {judgement.sqnr_db:.2f} dB, "
                f"{judgement.loss_db:.2f} dB below its own set"
            )
    arguments.out.write_text(as_json(universal_document(recipe, sets)), encoding="utf-8")
    console.print(f"wrote {arguments.out}")


def as_json(document: dict[str, Any]) -> str:
    """Indented JSON with one codebook and one judgement a line."""
    document = json.loads(json.dumps(document))
    rows = [row for rows in document["codebooks"].values() for row in rows]
    rows += [row for rows in document["provenance"]["judged"].values() for row in rows]
    text = json.dumps(document, indent=2)
    for row in rows:
        flat = json.dumps(row)
        indented = "\n".join("      " + line for line in json.dumps(row, indent=2).splitlines()).lstrip()
        deeper = "\n".join("        " + line for line in json.dumps(row, indent=2).splitlines()).lstrip()
        text = text.replace(deeper, flat).replace(indented, flat)
    return text + "\n"


def _operands(num_codebooks: int, recipe: Recipe) -> list[_Operand]:
    operands = []
    for size, (position, source) in itertools.product(recipe.array_sizes, enumerate(SOURCES)):
        seed = recipe.seed + 100 * size + 10 * position
        fitting = synthetic(source, (recipe.fit_scalars // size, size), seed)
        judging = synthetic(source, (recipe.judge_scalars // size, size), seed + 1)
        refining = fitting[: recipe.refine_scalars // size]
        operands.append(_Operand(source, FormatSpec(num_codebooks, size), fitting, refining, judging))
    return operands


def _judge(operand: _Operand, codebooks: Tensor, own: Tensor) -> Judgement:
    sqnr = sqnr_db(operand.judging, operand.spec, codebooks)
    loss = sqnr_db(operand.judging, operand.spec, own) - sqnr
    return Judgement(operand.source, operand.spec.array_size, round(sqnr, 3), round(loss, 3))


def _mix(operands: list[Tensor], mixture: tuple[float, ...]) -> Tensor:
    """The share of each operand's arrays, each in units of its own tensor scale: [n, L_A]."""
    parts = zip(operands, mixture, strict=True)
    return torch.cat([x[: int(len(x) * share / sum(mixture))] / absmax_tensor_scale(x) for x, share in parts])


if __name__ == "__main__":
    main()
