"""The universal codebooks: one frozen set for each N_c, used for weights and activations alike."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

import torch
from torch import Tensor

from lobcq_fx.format.spec import ALLOWED_NUM_CODEBOOKS

DATA_FILE = "universal_codebooks.json"


def universal_codebooks(num_codebooks: int) -> Tensor:
    """The shipped set of `num_codebooks` codebooks, int8 [N_c, 16].

    The data file says how it was fitted and by which command.

    Raises:
        ValueError: no such set.
    """
    if num_codebooks not in ALLOWED_NUM_CODEBOOKS:
        raise ValueError(f"no universal set of {num_codebooks} codebooks: use one of {ALLOWED_NUM_CODEBOOKS}")
    return torch.tensor(_shipped_sets()[str(num_codebooks)], dtype=torch.int8, device="cpu")


@cache
def _shipped_sets() -> dict[str, list[list[int]]]:
    text = resources.files(__package__).joinpath(DATA_FILE).read_text(encoding="utf-8")
    sets: dict[str, list[list[int]]] = json.loads(text)["codebooks"]
    return sets
