"""`lobcq export onnx`: a quantized model's folder in, a folder with an ONNX model out."""

from __future__ import annotations

import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lobcq_fx.cli.options import JsonOption, OverwriteOption

if TYPE_CHECKING:
    from lobcq_fx.export.folder import ExportSummary

MOST_TYPES = 12
"""Node types in the table; the rest are counted together."""


class Target(StrEnum):
    """Operators of our own domain, or ONNX Runtime's 8-bit MatMulNBits."""

    custom = "custom"
    matmulnbits = "matmulnbits"


def onnx(
    model: Annotated[
        str, typer.Argument(metavar="DIR", show_default=False, help="Folder that `lobcq quantize` wrote.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write.", show_default=False)],
    target: Annotated[
        Target,
        typer.Option(help="custom: 4-bit operators, with function bodies for stock runtimes; matmulnbits: 8-bit ones."),
    ] = Target.custom,
    fuse: Annotated[
        bool, typer.Option(help="Use ONNX Runtime's own attention, norms and rotary embedding (from version 1.22 on).")
    ] = True,
    last_logits_only: Annotated[
        bool,
        typer.Option("--last-logits-only", help="Return the logits of the last position, all that decoding reads."),
    ] = False,
    include_library: Annotated[
        bool, typer.Option("--include-library", help="Copy the op library into the folder, for onnxruntime-genai.")
    ] = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Export a quantized model to ONNX, and compare it with the torch model.

    The folder opens in stock ONNX Runtime; the op library (`lobcq_fx.export.register`) makes it fast.
    A language model's folder is one that onnxruntime-genai serves.
    """
    import lobcq_fx
    from lobcq_fx.cli.console import ProgressBars, print_json
    from lobcq_fx.cli.failures import InputError
    from lobcq_fx.cli.inputs import load_model, load_tokenizer, model_folder
    from lobcq_fx.cli.outputs import check_folder, writing
    from lobcq_fx.export import check_packages

    check_packages()
    folder = model_folder(model)
    if not folder.quantized:
        raise InputError(f"{folder.path} is a float model: quantize it first (`lobcq quantize {model} -o ...`)")
    packed = sum(file.stat().st_size for file in folder.path.glob("*.safetensors"))
    check_folder(output, overwrite=overwrite, needed_bytes=packed, replaceable=_is_export, source=folder.path)
    tokenizer = load_tokenizer(folder, required=False)
    started = time.perf_counter()
    with ProgressBars() as progress:
        progress("load", 0, 1)
        quantized = load_model(folder)
        progress("load", 1, 1)
        with writing(output):
            summary = lobcq_fx.export_onnx(
                quantized,  # type: ignore[arg-type]
                output,
                target=target.value,
                fuse=fuse,
                last_logits_only=last_logits_only,
                tokenizer=tokenizer,
                include_library=include_library,
                progress=progress,
            )
    result = _values(summary, time.perf_counter() - started)
    if json:
        print_json({"model": model, **result})
    else:
        _print(summary, result, causal=folder.is_causal_lm)


def _is_export(folder: Path) -> bool:
    from lobcq_fx.export.metadata import is_export

    return folder.is_dir() and is_export(folder)


def _values(summary: ExportSummary, seconds: float) -> dict[str, Any]:
    """The summary as JSON-ready values."""
    return {
        "output": str(summary.path),
        "nodes": summary.nodes,
        "library_nodes": summary.library_nodes,
        "bytes": summary.size,
        "difference_with_function_bodies": summary.differences.functions,
        "difference_with_library": summary.differences.library,
        "moved_codes": summary.differences.moved_codes,
        "fused_attentions": summary.fused_attentions,
        "unfused_attentions": [asdict(refusal) for refusal in summary.unfused_attentions],
        "left_in_float": [{"layer": one.layer, "reason": one.reason} for one in summary.left_in_float],
        "genai": summary.genai,
        "seconds": round(seconds, 2),
    }


def _print(summary: ExportSummary, result: dict[str, Any], *, causal: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lobcq_fx.inventory import readable_size

    console = Console(highlight=False)
    table = Table(title="ONNX model", show_header=False)
    table.add_row("On disk", readable_size(summary.size))
    table.add_row("Nodes", f"{sum(summary.nodes.values())}, {summary.library_nodes} of them faster by the op library")
    table.add_row("Largest difference to torch", f"{summary.differences.functions:.2g} of the largest value")
    if summary.differences.library is not None:
        table.add_row("The same with the op library", f"{summary.differences.library:.2g}")
    table.add_row(
        "Codes that rounding moved", f"{100 * summary.differences.moved_codes:.2g} % of an activation's at most"
    )
    table.add_row("Attention", f"{summary.fused_attentions} fused, {len(summary.unfused_attentions)} not")
    table.add_row("onnxruntime-genai", "yes" if summary.genai is None else f"no: {summary.genai}")
    table.add_row("Time", f"{result['seconds']:.1f} s")
    console.print(table)
    types = Table(title="Nodes by type", title_justify="left", show_header=False)
    shown = list(summary.nodes.items())
    for name, count in shown[:MOST_TYPES]:
        types.add_row(name, str(count))
    if len(shown) > MOST_TYPES:
        types.add_row(f"{len(shown) - MOST_TYPES} other types", str(sum(count for _, count in shown[MOST_TYPES:])))
    console.print(types)
    if summary.left_in_float:
        left = Table(title="Left in float", title_justify="left", show_header=False)
        for refusal in summary.left_in_float:
            left.add_row(escape(refusal.layer), escape(refusal.reason))
        console.print(left)
    console.print(f"Saved to [bold]{escape(str(summary.path))}[/].", soft_wrap=True)
    if causal:
        console.print(
            f'Next: [cyan]lobcq generate --onnx {escape(str(summary.path))} --prompt "..."[/]', soft_wrap=True
        )
