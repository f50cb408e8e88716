"""What a page or a summary says of an inventory: the worst layers, what was left alone and why, sizes as text.

Nothing here draws: the command line's summaries need neither matplotlib nor jinja2.
"""

from __future__ import annotations

import math
from collections import defaultdict

from lobcq_fx.inventory import Inventory, MatmulRecord


def worst_layers(inventory: Inventory, count: int) -> list[MatmulRecord]:
    """The quantized layers with the least SQNR, weights' and activations' taken together, worst first."""
    measured = [record for record in inventory.quantized if _least_sqnr(record) < math.inf]
    return sorted(measured, key=_least_sqnr)[:count]


def left_alone_by_reason(inventory: Inventory) -> dict[str, list[MatmulRecord]]:
    """The matmuls left in float under each reason, the reason with the most multiply-adds first."""
    groups: dict[str, list[MatmulRecord]] = defaultdict(list)
    for record in inventory.left_alone:
        groups[record.reason or ""].append(record)
    return dict(sorted(groups.items(), key=lambda item: -sum(record.macs for record in item[1])))


def parameters_outside_matmuls(inventory: Inventory) -> int:
    """Scalars in parameters that no matmul reads as its weight: embedding tables, norms, biases."""
    # A weight that serves several matmuls carries its bytes in the first record only.
    in_matmuls = sum(record.scalars for record in inventory.records if record.packed_bytes)
    return max(0, inventory.model_parameters - in_matmuls)


def _least_sqnr(record: MatmulRecord) -> float:
    values = (record.weight_sqnr_db, record.activation_sqnr_db)
    return min((value for value in values if value is not None), default=math.inf)


def readable_size(count: int) -> str:
    """A number of bytes for people: `"12.4 KiB"`, `"3.06 MiB"`, `"13.48 GiB"`."""
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
