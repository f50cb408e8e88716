"""Put what benchmarks/quality measured of whole models into docs/accuracy.md, between its markers.

python -m benchmarks.pages.accuracy           # rewrite the page
python -m benchmarks.pages.accuracy --check   # exit with 1 if it differs
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.pages.markdown import keep_page, table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "accuracy.md"
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    """Rewrite or check."""
    found = {
        name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in (
            "minilm_similarity",
            "smollm2",
            "same_treatment",
            "ablations",
            "rotation",
            "kv_cache",
            "attention",
            "perplexity",
            "compensation",
        )
    }
    sections = {
        "minilm": encoder(found["minilm_similarity"]),
        "smollm2": language_model(found["smollm2"]),
        "same treatment": formats(found["same_treatment"]),
        "ablations": ablations(found["ablations"]),
        "rotation": rotation(found["rotation"]),
        "kv cache": caches(found["kv_cache"]),
        "attention": attention(found["attention"]),
        "budgets": budgets(found["perplexity"]),
        "compensation": compensation(found["compensation"]),
    }
    keep_page(PAGE, sections, "accuracy", __doc__)


def language_model(found: dict[str, Any]) -> str:
    """One line for each way to quantize SmolLM2-135M-Instruct, and what it was measured with."""
    texts = list(found["tokens"])
    rows = [
        [
            name,
            f"{row['bits of activations']:g}",
            *(_rise(row[text]) for text in texts),
            f"{row[texts[0]]['KL']:.3f}",
            f"{100 * row[texts[0]]['same first token']:.1f} %",
        ]
        for name, row in found["rows"].items()
    ]
    first = next(iter(found["rows"].values()))
    lines = table(["recipe", "bits of activations", *texts, f"KL, {texts[0]}", "same first token"], rows)
    measured = "; ".join(
        f"{text}: {found['tokens'][text]:,} tokens, fp32 {first[text]['fp32 perplexity']:.2f}" for text in texts
    )
    return f"{lines}\n\nCalibrated on {found['calibration_tokens']:,} tokens. {measured}."


def compensation(found: dict[str, Any]) -> str:
    """A sentence: of the largest weight that was measured, and of what is derived from it."""
    (rows, columns), derived = found["rows"][-1]["shape"], found["derived"]
    seconds = {name: found["rows"][-1][name] for name in ("compensate", "nearest")}
    minutes = derived["factors_cpu_minutes"] + derived["rest_cpu_minutes"]
    return (
        f"A weight of {rows} x {columns} takes {seconds['compensate']:.1f} CPU seconds to compensate, and"
        f" {seconds['nearest']:.1f} to round to the nearest\n(`python -m benchmarks.cpu.compensation`, {found['cpu']})."
        f" By these rates the linears of Llama-3-8B would take {minutes:.0f} CPU\nminutes beside the runs of the model:"
        " derived, not measured."
    )


def budgets(found: dict[str, Any]) -> str:
    """One line for each calibrated model, a column for each way to spend the bits."""
    ways = {
        "w4a4 best": "8x64 everywhere",
        "4.5 bits by need": "4.5 bits by need",
        "4.5 bits by need, activations 5": "4.5 bits by need, activations 5",
    }
    rows = [
        [row["model"], *(f"+{100 * (row[way] / row['fp32'] - 1):.1f} %" for way in ways)]
        for row in found["rows"]
        if all(way in row for way in ways)
    ]
    return table(["model", *ways.values()], rows)


def caches(found: dict[str, Any]) -> str:
    """One line for each kind of cache, and what a token takes in it."""
    texts, sizes = list(found["tokens"]), found["bytes of a token"]
    rows = []
    for name, row in found["rows"].items():
        ratios = (row[text]["perplexity"] / row[text]["perplexity with floats"] for text in texts)
        first, rises = row[texts[0]], [f"+{100 * (ratio - 1):.1f} %" for ratio in ratios]
        rows.append([name, *rises, f"{first['KL']:.3f}", f"{100 * first['same first token']:.1f} %"])
    lines = table(["cache", *texts, f"KL, {texts[0]}", "same first token"], rows)
    tokens = "; ".join(f"{text}: {count:,} tokens" for text, count in found["tokens"].items())
    memory = ", ".join(f"{size:,.0f} in {name}" for name, size in sizes.items())
    return f"{lines}\n\n8x64 where nothing else is said. {tokens}. Bytes of a token, all layers: {memory}."


def attention(found: dict[str, Any]) -> str:
    """One line for each layer's sizes and for a model, two columns for each call."""
    calls, products = list(dict.fromkeys(row["call"] for row in found["rows"])), ("W4A16", "W4A8")
    times = {(row["of"], row["call"]): row for row in found["rows"]}
    rows = [
        [
            of,
            *(
                f"{times[of, call][one]:.2f}" if (of, call) in times else "not measured"
                for call in calls
                for one in products
            ),
        ]
        for of in dict.fromkeys(row["of"] for row in found["rows"])
    ]
    lines = table(["", *(f"{call}, {one}" for call in calls for one in products)], rows)
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    return f"{lines}\n\n{found['cpu']}, {threads}, torch {found['torch']}."


def formats(found: dict[str, Any]) -> str:
    """One line for each format and treatment, a column for each form of activations."""
    rows = [[name, bits, treatment, *rises] for (name, bits, treatment), rises in by_activations(found).items()]
    lines = table(["format", "bits", "weights", *(f"activations: {one}" for one in ACTIVATIONS)], rows)
    tokens = f"{found['tokens']:,} tokens, fp32 {found['rows'][0]['fp32 perplexity']:.2f}"
    return f"{lines}\n\nCalibrated on {found['calibration_tokens']:,} tokens. WikiText-2: {tokens}."


ACTIVATIONS = ("float", "int8", "4 bit")


def by_activations(found: dict[str, Any]) -> dict[tuple[str, str, str], list[str]]:
    """(format, bits, treatment) of same_treatment.json -> the rise with each form of activations."""
    rises: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in found["rows"]:
        rises.setdefault((row["format"], f"{row['bits']:g}", row["treatment"]), {})[row["activations"]] = _rise(row)
    return {line: [of.get(one, "not measured") for one in ACTIVATIONS] for line, of in rises.items()}


def rotation(found: dict[str, Any]) -> str:
    """One line for each shape, a column for each number of rows."""
    counts = list(dict.fromkeys(row["rows"] for row in found["rows"]))
    times = {(row["N x K"], row["rows"]): row["times"] for row in found["rows"]}
    shapes = list(dict.fromkeys(row["N x K"] for row in found["rows"]))
    rows = [[shape, *(f"{times[shape, count]:.2f}" for count in counts)] for shape in shapes]
    cpu = f"{found['cpu']}, {found['threads']} threads"
    return table(["N x K", *("1 row" if count == 1 else f"{count} rows" for count in counts)], rows) + f"\n\n{cpu}."


SETTINGS = {
    "codebooks N_c": "codebooks",
    "block length L_b": "block",
    "array length L_A": "array",
    "bits of entries": "entry_bits",
    "bits of codes": "entries",
    "start of the fit": "start",
}
"""Ablation -> the setting that it varies."""


def ablations(found: dict[str, Any]) -> str:
    """One line for each setting of each ablation, and the library's own codebooks below."""
    rows = [
        [
            row["ablation"],
            f"{row['entries'].bit_length() - 1}"
            if row["ablation"] == "bits of codes"
            else str(row[SETTINGS[row["ablation"]]]),
            f"{row['bits']:.4g}",
            _decibels(row["weights"]),
            _decibels(row["activations"]),
        ]
        for row in sorted(found["rows"], key=lambda row: list(SETTINGS).index(row["ablation"]))
    ]
    rows += [
        [f"the library, {books}", "", "4.5", _decibels(errors["weights"]), _decibels(errors["activations"])]
        for books, errors in found["library"].items()
    ]
    return table(["what varies", "setting", "bits", "weights, dB", "activations, dB"], rows)


def _decibels(error: float) -> str:
    return f"{-10 * math.log10(error):.2f}"


def _rise(row: dict[str, float]) -> str:
    """Of perplexity over fp32's."""
    return f"+{100 * (row['perplexity'] / row['fp32 perplexity'] - 1):.1f} %"


def encoder(found: dict[str, Any]) -> str:
    """One line for each way to quantize all-MiniLM-L6-v2."""
    rows = [
        [
            row["format"],
            f"{row['bits_per_scalar']:g}",
            row["operands"],
            row.get("recipe", "to the nearest"),
            f"{1 - row['mean_cosine']:.4f}",
        ]
        for row in found["rows"]
    ]
    return table(["format", "bits", "weights / activations", "recipe", "1 - mean cosine"], rows)


if __name__ == "__main__":
    main()
