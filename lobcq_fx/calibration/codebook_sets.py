"""Which codebooks encode what: one set for each format and operand, and the name it is stored under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lobcq_fx.format import FormatSpec, universal_codebooks

MODULE = "lobcq"
"""Submodule of the graph module that holds the codebooks."""


@dataclass(frozen=True)
class CodebookSets:
    """Codebooks int8 [N_c, 16] by format, for weights and for activations; the same tensor where they share a set."""

    weights: Mapping[FormatSpec, Tensor]
    activations: Mapping[FormatSpec, Tensor]

    @classmethod
    def universal(cls, formats: set[FormatSpec]) -> CodebookSets:
        """The shipped sets: one for each N_c, weights and activations alike."""
        by_count = {spec.num_codebooks: universal_codebooks(spec.num_codebooks) for spec in formats}
        shared = {spec: by_count[spec.num_codebooks] for spec in formats}
        return cls(shared, shared)

    def named(self) -> dict[str, Tensor]:
        """Each distinct set under its attribute name: `lobcq.codebooks` first, then `lobcq.codebooks_1`, ..."""
        distinct: list[Tensor] = []
        for codebooks in (*self.weights.values(), *self.activations.values()):
            if not any(codebooks is other for other in distinct):
                distinct.append(codebooks)
        return {f"{MODULE}.codebooks" + (f"_{i}" if i else ""): codebooks for i, codebooks in enumerate(distinct)}

    def name_of(self, codebooks: Tensor) -> str:
        """The attribute name of one of these sets."""
        return next(name for name, other in self.named().items() if other is codebooks)
