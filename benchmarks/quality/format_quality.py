"""Error against bits: LO-BCQ with the universal codebooks beside other 4-bit formats, on synthetic data.

    python -m benchmarks.quality.format_quality

Round to nearest, 2**19 scalars of each source as a [128, 4096] weight, SQNR in dB; seeds differ from those the
universal codebooks were fitted with. Peers are computed by torchao where it is installed (a development dependency:
`pip install --no-deps torchao`), else by benchmarks/quality/peer_formats.py, and the table says which. Also measured:
universal codebooks against a set fitted to each source, k-means++ against random starts, and the cost of INT6 entries.
Writes benchmarks/results/format_quality.json and docs/images/format_quality.png, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.format_quality_plot import draw
from benchmarks.quality.peer_formats import PEERS, torchao_version
from lobcq_fx.calibration import CodebookFit, fit_codebooks, refine_codebooks
from lobcq_fx.calibration.synthetic import SOURCES, Source, synthetic
from lobcq_fx.calibration.universal import sqnr_db
from lobcq_fx.format import PAPER_CONFIGURATIONS, FormatSpec, universal_codebooks

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "format_quality.json"
PLOT = ROOT / "docs" / "images" / "format_quality.png"

ROWS, COLUMNS = 128, 4096
TEST_SEED = 1_000
FIT_SEED = 2_000
FIT_SCALARS = 1 << 20
REFINE_SCALARS = 1 << 18
TORCHAO_TOLERANCE_DB = 0.01


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    arguments = parser.parse_args()
    version = torchao_version()
    if version is None:
        print("torchao is not installed: peers are computed by peer_formats.py and checked against nothing\n")
    data = {source: synthetic(source, (ROWS, COLUMNS), TEST_SEED + i) for i, source in enumerate(SOURCES)}
    result: dict[str, Any] = {
        "command": "python -m benchmarks.quality.format_quality",
        "measure": f"SQNR in dB, round to nearest, a [{ROWS}, {COLUMNS}] weight of each source",
        "torch": torch.__version__,
        "torchao": version,
        "machine": platform.machine(),
        "formats": lobcq_rows(data) + peer_rows(data, version),
        "universal_against_own": own_rows(data),
        "starts": start_rows(data),
    }
    result["rate_distortion_bound_gaussian_db_per_bit"] = round(20 * math.log10(2), 4)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_tables(result)
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    draw(result["formats"], arguments.plot)
    print(f"\nwrote {arguments.output} and {arguments.plot}")


def lobcq_rows(data: dict[Source, Tensor]) -> list[dict[str, Any]]:
    """One row for each configuration of the paper, with the universal codebooks."""
    rows = []
    for spec in PAPER_CONFIGURATIONS.values():
        codebooks = universal_codebooks(spec.num_codebooks)
        sqnr = {source: round(sqnr_db(x, spec, codebooks), 2) for source, x in data.items()}
        bits = spec.stored_bits(ROWS, COLUMNS) / (ROWS * COLUMNS)
        rows.append(_row(f"LO-BCQ {spec.name}", bits, "lobcq_fx", sqnr))
    return rows


def peer_rows(data: dict[Source, Tensor], version: str | None) -> list[dict[str, Any]]:
    """One row for each other format.

    Raises:
        AssertionError: our few lines differ from torchao, so that no number is printed for a wrong peer.
    """
    rows = []
    for peer in PEERS:
        sqnr = {source: _sqnr(x, peer.ours(x)) for source, x in data.items()}
        if version is not None:
            theirs = {source: _sqnr(x, peer.theirs(x)) for source, x in data.items()}
            apart = max(abs(sqnr[source] - theirs[source]) for source in data)
            assert apart < TORCHAO_TOLERANCE_DB, f"{peer.name} is {apart:.3f} dB from torchao's"
            sqnr = theirs
        computed_by = "benchmarks/quality/peer_formats.py" if version is None else f"torchao {version}"
        rounded = {source: round(value, 2) for source, value in sqnr.items()}
        rows.append(_row(peer.name, peer.bits, computed_by, rounded))
    return rows


def own_rows(data: dict[Source, Tensor]) -> list[dict[str, Any]]:
    """What the universal set loses against a set fitted to the source, for every N_c and array size."""
    specs = [*PAPER_CONFIGURATIONS.values(), FormatSpec(8, 16), FormatSpec(8, 32)]
    rows = []
    for spec in specs:
        universal, fitted, refined = {}, {}, {}
        for i, (source, x) in enumerate(data.items()):
            arrays = synthetic(source, (FIT_SCALARS // spec.array_size, spec.array_size), FIT_SEED + i)
            own = fit_codebooks(arrays, spec).codebooks
            better = refine_codebooks(own, [arrays[: REFINE_SCALARS // spec.array_size]])
            reached = sqnr_db(x, spec, universal_codebooks(spec.num_codebooks))
            universal[source] = round(reached, 2)
            fitted[source] = round(sqnr_db(x, spec, own) - reached, 2)
            refined[source] = round(sqnr_db(x, spec, better) - reached, 2)
        rows.append(
            {
                "format": spec.name,
                "sqnr_db": universal,
                "below_fitted_db": fitted,
                "below_fitted_and_refined_db": refined,
            }
        )
    return rows


def start_rows(data: dict[Source, Tensor]) -> list[dict[str, Any]]:
    """k-means++ against random start: error before and after INT6 rounding, iterations, time."""
    rows = []
    for name in ("8x64", "16x64"):
        spec = FormatSpec.from_name(name)
        for i, (source, x) in enumerate(data.items()):
            arrays = synthetic(source, (FIT_SCALARS // spec.array_size, spec.array_size), FIT_SEED + i)
            for init in ("kmeans++", "random"):
                start = time.process_time()
                fit: CodebookFit = fit_codebooks(arrays, spec, init=init)  # type: ignore[arg-type]
                seconds = time.process_time() - start
                rows.append(
                    {
                        "format": name,
                        "source": source,
                        "init": init,
                        "mse_start": round(fit.mse_history[0], 4),
                        "mse_float": round(fit.mse_history[-1], 4),
                        "mse_int6": round(fit.mse_rounded, 4),
                        "rounding_cost_db": round(fit.rounding_cost_db, 3),
                        "sqnr_db": round(sqnr_db(x, spec, fit.codebooks), 2),
                        "iterations": fit.iterations,
                        "cpu_seconds": round(seconds, 1),
                    }
                )
    return rows


def print_tables(result: dict[str, Any]) -> None:
    """The three tables as markdown."""
    heads = " | ".join(SOURCES)
    print(f"{result['measure']}\n\n| format | bits | {heads} | computed by |\n|---|---|---|---|---|---|")
    for row in sorted(result["formats"], key=lambda row: row["bits_per_scalar"]):
        print(f"| {row['format']} | {row['bits_per_scalar']:.4g} | {_cells(row['sqnr_db'])} | {row['computed_by']} |")
    print(f"\nUniversal set, and how far below a set of its own (fitted; fitted and refined)\n\n| format | {heads} |")
    print("|---|---|---|---|")
    for row in result["universal_against_own"]:
        cells = [
            f"{row['sqnr_db'][s]:.2f} ({row['below_fitted_db'][s]:+.2f}; {row['below_fitted_and_refined_db'][s]:+.2f})"
            for s in SOURCES
        ]
        print(f"| {row['format']} | {' | '.join(cells)} |")
    print(f"\nStarts, {FIT_SCALARS} scalars, MSE in squared INT6 steps of normalised scalars\n")
    print(
        "| format | source | start | MSE at start | MSE float | MSE INT6 | rounding cost | SQNR | iterations | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in result["starts"]:
        cells = [str(value) for value in row.values()]
        print(f"| {' | '.join(cells)} |")


def _row(name: str, bits: float, computed_by: str, sqnr: dict[Source, float]) -> dict[str, Any]:
    return {"format": name, "bits_per_scalar": round(bits, 4), "computed_by": computed_by, "sqnr_db": sqnr}


def _sqnr(x: Tensor, rounded: Tensor) -> float:
    noise = (rounded - x).double().square().sum()
    return 10 * math.log10(float(x.double().square().sum() / noise))


def _cells(values: dict[Source, float]) -> str:
    return " | ".join(f"{value:.2f}" for value in values.values())


if __name__ == "__main__":
    main()
