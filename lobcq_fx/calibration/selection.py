"""Choosing a few codebooks out of many: how sets fitted to different data become one set that serves all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lobcq_fx.calibration.noise import BlockErrors, shortfall_db

LEAST_GAIN_DB = 1e-5
"""An exchange must gain this much, so that the search ends."""


def select_codebooks(pool: Tensor, count: int, operands: Sequence[Tensor], targets: Sequence[float]) -> Tensor:
    """Choose codebooks greedily, then exchange one at a time as long as that helps.

    Args:
        pool: int8 [P, 16], each row sorted ascending, P > 0.
        count: N_c. A pool of fewer distinct codebooks gives repeated ones.
        operands: float [n, L_A] each, L_A its own. The search keeps n * L_A * P / 8 fp64 numbers an operand.
        targets: for each operand an SQNR in dB; the search lowers a soft maximum of the shortfalls.

    Returns:
        int8 [count, 16].
    """
    wanted = torch.tensor(targets, dtype=torch.float64, device="cpu")
    parts = [BlockErrors.of(arrays, pool) for arrays in operands]

    def best_beside(chosen: list[int]) -> tuple[float, int]:
        shortfall = shortfall_db(torch.stack([part.noise_beside(chosen, part.errors) for part in parts]), wanted)
        best = int(shortfall.argmin())
        return float(shortfall[best]), best

    chosen: list[int] = []
    present = float("inf")
    while len(chosen) < count:
        present, best = best_beside(chosen)
        chosen.append(best)
    k = unchanged = 0
    while unchanged < count:
        shortfall, best = best_beside(chosen[:k] + chosen[k + 1 :])
        if shortfall < present - LEAST_GAIN_DB:
            present, chosen[k], unchanged = shortfall, best, 0
        else:
            unchanged += 1
        k = (k + 1) % count
    return pool[chosen]
