"""The `lobcq` application: its commands, its global options, and how it ends."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import lobcq_fx
from lobcq_fx.cli.bench import bench
from lobcq_fx.cli.calibrate import calibrate
from lobcq_fx.cli.chat import chat
from lobcq_fx.cli.console import messages
from lobcq_fx.cli.evaluate import evaluate
from lobcq_fx.cli.export import onnx
from lobcq_fx.cli.failures import EXIT_CODES, explain, is_ours_to_explain
from lobcq_fx.cli.generate import generate
from lobcq_fx.cli.quantize import quantize
from lobcq_fx.cli.report import report
from lobcq_fx.cli.serve import serve
from lobcq_fx.cli.verify import verify
from lobcq_fx.errors import RankError

HELP = "LO-BCQ for PyTorch models: 4.5 bits a scalar for weights and activations."


class Commands(TyperGroup):
    """Turns what a command raises into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: with the exit code of what went wrong.
        """
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params["debug"] or not is_ours_to_explain(error):
                raise
            code, message = explain(error)
            if not isinstance(error, RankError):
                messages.quiet = False
            messages.print(f"[bold red]lobcq:[/] {message}", highlight=False, soft_wrap=True)
            raise typer.Exit(code) from None


app = typer.Typer(
    name="lobcq",
    help=HELP,
    epilog=EXIT_CODES,
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in (
    ("quantize", quantize),
    ("eval", evaluate),
    ("generate", generate),
    ("chat", chat),
    ("report", report),
    ("calibrate", calibrate),
    ("verify", verify),
    ("bench", bench),
):
    app.command(name, epilog=EXIT_CODES)(command)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("serve", epilog=EXIT_CODES, context_settings=PASSED_ON)(serve)
export = typer.Typer(help="Write a quantized model for other runtimes.", no_args_is_help=True, rich_markup_mode="rich")
export.command("onnx", epilog=EXIT_CODES)(onnx)
export.callback()(lambda: None)  # keeps `onnx` a command of its own while there is only one
app.add_typer(export, name="export")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lobcq {lobcq_fx.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LOBCQ_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Global options; `Commands.invoke` reads `debug`."""
