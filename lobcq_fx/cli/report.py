"""`lobcq report`: an HTML page about a quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lobcq_fx.cli.options import JsonOption, OverwriteOption


def report(
    model: Annotated[
        str, typer.Argument(metavar="DIR", show_default=False, help="Folder that [bold]lobcq quantize[/] wrote.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="HTML file to write.")] = Path(
        "report.html"
    ),
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="What [bold]lobcq eval -o FILE[/] wrote, to be shown."),
    ] = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Write one self-contained HTML file: results, error by layer, sizes, codebooks, what was left in float and why."""
    from lobcq_fx.cli.console import messages, print_json
    from lobcq_fx.cli.failures import InputError
    from lobcq_fx.cli.inputs import model_folder, read_json
    from lobcq_fx.cli.outputs import check_file
    from lobcq_fx.report import write_report

    folder = model_folder(model)
    if not folder.quantized:
        raise InputError(f"{folder.path} is a float model: quantize it first with `lobcq quantize {model} -o OUT`")
    if output.is_dir():
        raise typer.BadParameter(f"-o {output} is a folder: name a file, for example {output / 'report.html'}")
    check_file(output, overwrite=overwrite)
    found = None if scores is None else read_json(scores)
    with messages.status("Drawing"):
        write_report(folder.path, output, found)
    if json:
        print_json({"report": str(output), "bytes": output.stat().st_size})
    else:
        typer.echo(f"Wrote {output} ({output.stat().st_size / 1024:.0f} KiB)")
