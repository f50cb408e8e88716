"""What became of a model, and warnings of what was left in float or never seen although nobody asked for that."""

from __future__ import annotations

import logging
from textwrap import shorten

from lobcq_fx.calibration.groups import prior_rows
from lobcq_fx.inventory import Inventory, MatmulRecord

logger = logging.getLogger(__name__)

LARGE_SHARE = 0.05
"""Of bytes or multiply-adds: what is left in float without being excluded is worth a warning from here on."""


def inventory_of(records: tuple[MatmulRecord, ...], scalars: int, float_bytes: int) -> Inventory:
    """What became of a model of so many parameters; the log has what is worth a warning in it."""
    saved = sum(record.float_bytes - record.packed_bytes for record in records)
    inventory = Inventory(records, scalars, float_bytes, float_bytes - saved)
    _warn_of_leftovers(inventory)
    _warn_of_unreached(inventory)
    return inventory


def _warn_of_leftovers(inventory: Inventory) -> None:
    """Say loudly what stays in float although no pattern asked for it."""
    left = [r for r in inventory.left_alone if r.float_bytes and not r.excluded]
    share = sum(record.float_bytes for record in left) / max(1, inventory.model_float_bytes)
    coverage = inventory.asked_coverage
    if share <= LARGE_SHARE and coverage >= 1 - LARGE_SHARE:
        return
    left.sort(key=lambda record: (record.macs, record.float_bytes), reverse=True)
    reasons = "; ".join(dict.fromkeys(f"{record.layer or record.operation}: {record.reason}" for record in left))
    logger.warning(
        "%.0f %% of the model's bytes, and %.0f %% of its multiply-adds, stay in float, unasked: %s",
        100 * share, 100 * (1 - coverage), shorten(reasons, 300, placeholder=" ..."),
    )  # fmt: skip


def _warn_of_unreached(inventory: Inventory) -> None:
    """Say which mixtures have experts that got no token, or few: what was seen of all stands for them."""
    for record in inventory.quantized:
        count = record.undersampled or record.unreached
        if not count:
            continue
        assert record.shape is not None
        experts, _, columns = record.shape
        few = (
            f"fewer than {prior_rows(columns)} tokens ({record.unreached} none)" if record.undersampled else "no token"
        )
        logger.warning(
            "%d of %d experts of %s got %s of the calibration data: what all of them got stands for these."
            " Remedy: more calibration data",
            count, experts, record.layer, few,
        )  # fmt: skip
