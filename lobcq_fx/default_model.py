"""Where the embedded default model lies."""

from __future__ import annotations

from pathlib import Path


def default_model_path() -> Path:
    """Folder of a small Llama-architecture language model trained on the Python standard library's source.

    It holds the weights, the tokenizer, and `heldout.txt`, text the model has not seen.
    """
    return Path(__file__).parent / "assets" / "default_model"
