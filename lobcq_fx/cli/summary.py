"""The summary at the end of `lobcq quantize`: as a table for people and as JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lobcq_fx.cli.console import TITLES
from lobcq_fx.config import LobcqConfig
from lobcq_fx.inventory import Inventory, readable_size

WORST = 5


def summary(
    inventory: Inventory, config: LobcqConfig, output: Path, seconds: float, steps: Mapping[str, float]
) -> dict[str, Any]:
    """What was done, as JSON-ready values; shares from 0 to 1, SQNR in dB.

    seconds: in all. steps: of each step, by name.
    """
    return {
        "output": str(output),
        "config": config.to_dict(),
        "layers_quantized": len(inventory.quantized),
        "matmuls_left_in_float": len(inventory.left_alone),
        "parameter_coverage": inventory.parameter_coverage,
        "mac_coverage": inventory.mac_coverage,
        "bits_per_scalar": inventory.bits_per_scalar,
        "float_bytes": inventory.model_float_bytes,
        "packed_bytes": inventory.model_packed_bytes,
        "bytes_on_disk": sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
        "worst_layers": [
            {"layer": r.layer, "weight_sqnr_db": r.weight_sqnr_db, "activation_sqnr_db": r.activation_sqnr_db}
            for r in inventory.worst(WORST)
        ],
        "left_in_float": [
            {"reason": reason, "layers": [r.layer for r in records], "mac_share": inventory.mac_share(records)}
            for reason, records in inventory.left_alone_by_reason.items()
        ],
        "seconds": round(seconds, 2),
        "seconds_by_step": {step: round(taken, 2) for step, taken in steps.items()},
    }


def print_summary(inventory: Inventory, result: dict[str, Any], model: str, *, generates: bool, measured: bool) -> None:
    """The same, as tables on standard output, and what to do next.

    Args:
        inventory: the model's.
        result: its `summary`.
        model: the float model's folder.
        generates: whether `lobcq generate` takes it. measured: whether `lobcq eval` does.
    """
    console = Console(highlight=False)
    console.print(_totals(inventory, result))
    if result["worst_layers"]:
        console.print(_worst(result))
    if result["left_in_float"]:
        console.print(_left_in_float(result))
    where = result["output"]
    evaluate = [f"eval {where} --against {model}"] if measured else []
    generate = [f'generate {where} --prompt "..."'] if generates else []
    console.print(f"Saved to [bold]{escape(where)}[/]. Next:", soft_wrap=True)
    for command in (*evaluate, *generate, f"report {where} -o report.html"):
        console.print(f" [cyan]lobcq {escape(command)}[/]", soft_wrap=True)


def _totals(inventory: Inventory, result: dict[str, Any]) -> Table:
    formats = Counter(str(record.number_format) for record in inventory.quantized)
    title = f"Quantized to {next(iter(formats))}" if len(formats) == 1 else "Quantized"
    table = Table(title=title, show_header=False)
    for name, count in formats.most_common() if len(formats) > 1 else ():
        table.add_row(name, f"{count} matmuls")
    table.add_row("Layers", f"{result['layers_quantized']} of {len(inventory.records)} matmuls")
    table.add_row("Parameters covered", f"{100 * result['parameter_coverage']:.1f} %")
    table.add_row("Multiply-adds covered", f"{100 * result['mac_coverage']:.1f} %")
    table.add_row("Bits per quantized weight", f"{result['bits_per_scalar']:.3f}")
    smoothed = Counter(record.smoothing for record in inventory.quantized if record.smoothing)
    if smoothed:
        table.add_row("Smoothed layers", ", ".join(f"{count} {kind}" for kind, count in sorted(smoothed.items())))
    rotated = sum(record.rotated for record in inventory.quantized)
    if rotated:
        table.add_row("Rotated layers", str(rotated))
    unreached = sum(record.unreached or 0 for record in inventory.quantized)
    if unreached:
        table.add_row("Experts without calibration data", str(unreached))
    undersampled = sum(record.undersampled or 0 for record in inventory.quantized)
    if undersampled > unreached:
        table.add_row("Experts with too little calibration data", str(undersampled))
    shrunk = result["float_bytes"] / max(1, result["packed_bytes"])
    sizes = f"{readable_size(result['float_bytes'])} → {readable_size(result['packed_bytes'])}"
    table.add_row("All parameters", f"{sizes} ({shrunk:.1f}x smaller)")
    table.add_row("On disk", readable_size(result["bytes_on_disk"]))
    table.add_row("Time", f"{result['seconds']:.1f} s")
    for step, taken in result["seconds_by_step"].items():
        table.add_row(f"  {TITLES.get(step, step)}", f"{taken:.1f} s")
    return table


def _worst(result: dict[str, Any]) -> Table:
    unmeasured = all(row["activation_sqnr_db"] is None for row in result["worst_layers"])
    hint = (
        "Activations are measured with --calibrate TEXT" if unmeasured and result["config"]["mode"] != "w4a16" else None
    )
    table = Table(title="Worst layers, SQNR in dB", title_justify="left", caption=hint, caption_justify="left")
    table.add_column("Layer", overflow="fold")
    table.add_column("Weights", justify="right")
    table.add_column("Activations", justify="right")
    for row in result["worst_layers"]:
        table.add_row(row["layer"], _db(row["weight_sqnr_db"]), _db(row["activation_sqnr_db"]))
    return table


def _left_in_float(result: dict[str, Any]) -> Table:
    table = Table(title="Left in float", title_justify="left")
    table.add_column("Reason")
    table.add_column("Matmuls", overflow="fold")
    table.add_column("Multiply-adds", justify="right")
    for row in result["left_in_float"]:
        names = row["layers"]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        table.add_row(
            escape(row["reason"]), names[0] + more, f"{100 * row['mac_share']:.1f} %" if row["mac_share"] else "-"
        )
    return table


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
