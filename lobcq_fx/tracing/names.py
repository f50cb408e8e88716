"""Names of a model's tensors that a graph module cannot have: FX has attributes of its own, and writes Python code."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection
from functools import cache

from torch import fx, nn
from torch.export import ExportedProgram

from lobcq_fx.calibration.codebook_sets import MODULE

_PART = re.compile(r"[\w-]+")
"""List indices and hyphens are fine: FX writes them as strings."""


def rename_for_fx(program: ExportedProgram) -> None:
    """Give other names to parameters, buffers and constants of an exported program that FX would stumble over."""
    stores = (program.state_dict, program.constants)
    taken = {name for store in stores for name in store}
    renamed = {name: _free(usable_name(name), taken) for name in sorted(taken) if usable_name(name) != name}
    for store in stores:
        for name in [name for name in store if name in renamed]:
            store[renamed[name]] = store.pop(name)
    signature = program.graph_signature
    for spec in (*signature.input_specs, *signature.output_specs):
        if spec.target in renamed:
            spec.target = renamed[spec.target]


def usable_name(name: str) -> str:
    """A dotted name as a graph module can have it, the same where it can."""
    first, *rest = name.split(".")
    first = f"{first}_" if first in _reserved() else first
    return ".".join(_usable_part(part) for part in (first, *rest))


def _usable_part(part: str) -> str:
    if keyword.iskeyword(part):
        return f"{part}_"
    return part if _PART.fullmatch(part) else re.sub(r"[^\w-]", "_", part) or "_"


@cache
def _reserved() -> frozenset[str]:
    return frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) | {MODULE}


def _free(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name = f"{name}_"
    return name
