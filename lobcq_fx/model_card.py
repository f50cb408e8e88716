"""The README.md of a saved model: what it is, what was quantized and how well, and how to open it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lobcq_fx.config import LobcqConfig
from lobcq_fx.inventory import Inventory, readable_size

FILE = "README.md"
OURS = "<!-- written by lobcq_fx: saving the model again replaces this page; without this line it stays -->"

_OPEN_CAUSAL_LM = """import lobcq_fx
from transformers import AutoTokenizer

folder = "."  # where this page is
model, tokenizer = lobcq_fx.load(folder), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"""

_OPEN_TEXT_TO_TEXT = """import lobcq_fx
from transformers import AutoTokenizer

folder = "."  # where this page is
model, tokenizer = lobcq_fx.load(folder), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("What the model is to read.", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0], skip_special_tokens=True))"""

_EVAL = ": `lobcq eval . --against FLOAT_FOLDER` does"

_OPEN_OTHER = """import lobcq_fx

model = lobcq_fx.load(".")  # where this page is; called as the float model was"""


@dataclass(frozen=True)
class ModelCard:
    """Writes the page into a folder that is about to take the place of another.

    inventory, lobcq_config: the model's. config: its Hugging Face configuration, None without one.
    replaced: the folder that the new one will replace, which may have a page of somebody's own.
    """

    inventory: Inventory
    lobcq_config: LobcqConfig
    config: Mapping[str, Any] | None
    replaced: Path

    def save_pretrained(self, folder: Path) -> None:
        """Write the page, unless the folder that is replaced has one that is not ours: that stays."""
        if is_ours(self.replaced / FILE):
            (folder / FILE).write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The page, with the metadata that a hub reads at its beginning."""
        config = self.config or {}
        architecture = str((config.get("architectures") or ["A module"])[0])
        causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
        answers = bool(config.get("is_encoder_decoder")) and architecture.endswith(
            ("ForConditionalGeneration", "MTModel")
        )
        reads_text = answers and "num_mel_bins" not in config
        kind = ["pipeline_tag: text-generation"] if causal else []
        opening = _OPEN_CAUSAL_LM if causal else _OPEN_TEXT_TO_TEXT if reads_text else _OPEN_OTHER
        metadata = ["library_name: lobcq-fx", *kind, "tags:", "- lobcq", "- quantized", "- 4-bit"]
        sections = [
            "\n".join(["---", *metadata, "---"]),
            OURS,
            f"# {architecture} in LO-BCQ",
            "Quantized with lobcq_fx to LO-BCQ (Elangovan et al., TMLR 2025, arXiv 2502.05376).",
            self._facts(),
            self._left_in_float(),
            "Signal to quantization noise says how well numbers are kept, layer by layer; what that does to the model's"
            f" results was not measured here{'' if answers else _EVAL}.",
            f"## To open it\n\n```py\n{opening}\n```",
        ]
        return "\n\n".join(section for section in sections if section) + "\n"

    def _facts(self) -> str:
        inventory, settings = self.inventory, self.lobcq_config
        formats = Counter(str(record.number_format) for record in inventory.quantized)
        calibrated = ", ".join(f"`{one}`" for one in settings.calibrated) or "without data"
        rows = [
            (
                "quantized",
                "; ".join(f"{count} matmul{'s'[: count > 1]} in {name}" for name, count in formats.most_common()),
            ),
            (
                "settings",
                f"{calibrated}; codebooks {settings.codebooks}; activation scales {settings.activation_scale}",
            ),
            ("parameters covered", f"{100 * inventory.parameter_coverage:.1f} %"),
            ("multiply-adds covered", f"{100 * inventory.mac_coverage:.1f} % of those with a weight"),
            ("bits of a quantized weight", f"{inventory.bits_per_scalar:.3f}"),
            (
                "all parameters",
                f"{readable_size(inventory.model_float_bytes)}, {readable_size(inventory.model_packed_bytes)} now",
            ),
            *self._noise(),
        ]
        return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])

    def _noise(self) -> list[tuple[str, str]]:
        found = []
        for name in ("weight", "activation"):
            field = f"{name}_sqnr_db"
            measured = [record for record in self.inventory.quantized if getattr(record, field) is not None]
            if measured:
                worst = min(measured, key=lambda record: getattr(record, field))
                mean = fmean(getattr(record, field) for record in measured)
                value = f"{mean:.1f} dB on the average; least in {worst.layer}, {getattr(worst, field):.1f} dB"
                found.append((f"signal to noise, {name}s", value))
        return found

    def _left_in_float(self) -> str:
        lines = []
        for reason, records in self.inventory.left_alone_by_reason.items():
            names = [record.layer or record.operation for record in records if record.shape is not None]
            if names:
                lines.append(f"- {names[0]}{_others(len(names) - 1)}: {reason}")
        return "\n".join(["Left in float:", "", *lines]) if lines else ""


def is_ours(page: Path) -> bool:
    """Whether a page may be replaced: there is none, or one that this package wrote."""
    try:
        return OURS in page.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def _others(count: int) -> str:
    return f" and {count} more" if count else ""
