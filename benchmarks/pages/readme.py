"""Put the measured results into README.md, between its markers.

    python -m benchmarks.pages.readme           # rewrite README.md
    python -m benchmarks.pages.readme --check   # exit with 1 if it differs

Reads benchmarks/results/*.json, which the other benchmarks write; so no figure in the README is typed by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pages.accuracy import by_activations
from benchmarks.pages.cpu_models import model_section, step_section
from benchmarks.pages.cpu_tables import cpu_section
from benchmarks.pages.markdown import keep_page, table

PERPLEXITIES = {
    "fp32": "fp32",
    "w4a16": "W4A16",
    "w4a4": "W4A4",
    "w4a16 balanced": "W4A16, balanced",
    "w4a8 balanced": "W4A8, balanced",
    "w4a4 balanced": "W4A4, balanced",
}
"""Columns, by their names in the results."""

NOT_MEASURED = "Not measured yet."

RESULTS = Path(__file__).parents[1] / "results"
README = RESULTS.parents[1] / "README.md"

TREATMENT = "smoothed and compensated"
"""The one that every format has had."""


def main() -> None:
    """Rewrite or check."""
    sections = {"perplexity": perplexity(), "treated": treated(), "minilm": minilm(), "sqnr": sqnr(), "cpu": cpu()}
    sections |= {"cpu-model": cpu_model(), "cpu-model-step": cpu_model_step(), "onnx": onnx()}
    keep_page(README, sections, "readme", __doc__)


def perplexity() -> str:
    """Three language models in fp32 and quantized."""
    rows = [
        [
            row["model"],
            row["text"],
            f"{row['parameter_coverage']:.0%}",
            *(f"{row[way]:.2f}" if way in row else "not measured" for way in PERPLEXITIES),
        ]
        for row in results("perplexity")["rows"]
    ]
    return table(["model", "text", "parameters quantized", *PERPLEXITIES.values()], rows)


def treated() -> str:
    """SmolLM2-135M-Instruct in formats under the same treatment, by what becomes of activations."""
    lines = by_activations(results("same_treatment")).items()
    rows = [[name, bits, *rises] for (name, bits, treatment), rises in lines if treatment == TREATMENT]
    return table(["format", "bits a scalar", "W4A16", "W4A8", "W4A4"], rows)


def minilm() -> str:
    """all-MiniLM-L6-v2 beside other formats."""
    rows = [
        [
            row["format"],
            f"{row['bits_per_scalar']:g}",
            row["operands"],
            row.get("recipe", "to the nearest"),
            f"{row['mean_cosine']:.4f}",
        ]
        for row in results("minilm_similarity")["rows"]
    ]
    return table(["format", "bits a scalar", "weights / activations", "recipe", "mean cosine"], rows)


def sqnr() -> str:
    """Synthetic sources, every format."""
    rows = [
        [
            row["format"],
            f"{row['bits_per_scalar']:.3f}",
            *(f"{row['sqnr_db'][source]:.1f}" for source in ("gaussian", "laplace", "student-t4")),
            row["computed_by"],
        ]
        for row in results("format_quality")["formats"]
    ]
    return table(["format", "bits a scalar", "Gaussian", "Laplace", "Student-t (4)", "computed by"], rows)


def cpu() -> str:
    """The speed of a linear, where it has been measured."""
    return cpu_section(results("cpu")) if measured("cpu") else NOT_MEASURED


def cpu_model() -> str:
    """Generation by a model of 1.1 billion parameters, each contender's speed and memory."""
    return model_section(results("cpu_model")) if measured("cpu_model") else NOT_MEASURED


def cpu_model_step() -> str:
    """Where one decode step's milliseconds go."""
    return step_section(results("cpu_model")) if measured("cpu_model") else NOT_MEASURED


def onnx() -> str:
    """The exported model against ONNX Runtime's own formats."""
    if not measured("onnx_export"):
        return NOT_MEASURED
    report = results("onnx_export")
    sessions = {row["contender"]: row for row in report["sessions"]}
    rivals = ("ORT fp32", "ORT int4")
    quantities = ["decode", *(f"prefill_{length}" for length in report["prompts"])]
    rows = []
    for row in report["speed"]:
        session = sessions[row["contender"]]
        speeds = [
            f"{row[f'{what}_tokens_per_second']:.1f} ("
            + ", ".join(f"{row[f'{what}_x_{rival}']:.2f}x" for rival in rivals)
            + ")"
            for what in quantities
        ]
        sizes = [f"{session[key] / 1024:.2f}" for key in ("disk_mib", "peak_mib")]
        rows.append([row["contender"], str(row["threads"]), *speeds, f"{session['create_seconds']:.1f}", *sizes])
    prompts = [f"prompt of {length}" for length in report["prompts"]]
    header = ["model", "threads", "decode, tokens/s", *prompts, "session, s", "disk, GiB", "peak, GiB"]
    note = "In parentheses how many times as fast as ORT fp32, and as ORT int4 at accuracy level 4. "
    note += (
        f"{report['cpu']}, onnxruntime {report['versions']['onnxruntime']}; sessions and memory with one thread:\n\n"
    )
    return note + table(header, rows)


def measured(name: str) -> bool:
    """Whether a benchmark has written anything."""
    return (RESULTS / f"{name}.json").is_file()


def results(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


if __name__ == "__main__":
    main()
