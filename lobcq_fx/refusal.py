"""Why something was left as it was: the one type for it, from layer choice over passes to export."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why a step or a pass left something as it was.

    by: the step or pass. layer: module path of the linear, of the first where a call has several; "" for the whole
    graph. reason: for the user.
    """

    by: str
    layer: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.by, self.layer, self.reason) if part)
