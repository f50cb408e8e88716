"""`lobcq bench`: our linear against those of others, on this machine and on shapes of one's own; or a whole model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lobcq_fx.cli.bench_model import Asked, bench_model, print_models
from lobcq_fx.cli.options import JsonOption, Mode, OverwriteOption

if TYPE_CHECKING:
    from lobcq_fx.format import FormatSpec

_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NxK",
            help="Weight of K inputs and N outputs; repeat it for several."
            " Default: 2048x2048, 4096x4096, 11008x4096 and 4096x11008.",
        ),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="M", help="Tokens in one call; repeat it for several. Default: 1, 8, 64 and 512."),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="NxL", help="As of [bold]lobcq quantize[/]; repeatable. Default: 8x64."),
    ] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="Activations in 4 bits as weights are, in 8, or in float. Default: w4a4.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_or_default",
            show_default=False,
            help="Instead of linears: let this language model generate, quantized or not.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="DIR_or_default", help="With --model: a second model to race, the float one."),
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --model: what [bold]lobcq export onnx[/] made of it, to race as well."),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --model: length of the prompt. Default: 128, or what fits.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, help="With --model: tokens to generate. Default: 32, or what fits.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --model: draw the result, as .png, .svg or .pdf.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="For everybody; default: what torch uses.")] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Each contender takes a turn a round; medians over the rounds are printed.")
    ] = 5,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Time the C++ core's linear against those of torch, ONNX Runtime, OpenVINO and torchao that are installed.

    Every product is checked before it is timed. The encoding of activations is part of our time. Up to 8 tokens the
    weights lie in no cache, as when a model writes one token after the other.

    With --model, time generate() of a model of yours instead, as you would call it: tokens a second of the prompt and
    of what follows, beside the most that the speed of memory allows. Each has to choose the same tokens in every run.
    """
    from lobcq_fx.cli.console import print_json

    of_linears = {"--shape": shape, "--rows": rows, "--format": format, "--mode": mode}
    of_models: dict[str, object] = {"--against": against, "--onnx": onnx, "--plot": plot}
    of_models |= {"--prompt-tokens": prompt_tokens, "--new-tokens": new_tokens}
    if model is None:
        _refuse(of_models, "it is about a model: pass --model DIR too")
        found, shown = _linears(shape, rows, format or ["8x64"], mode or Mode.w4a4, threads, rounds), _print
    else:
        _refuse(of_linears, "it is about linears: leave it out, or --model")
        asked = Asked(model, against, onnx, prompt_tokens, new_tokens, threads, rounds, plot, overwrite)
        found, shown = bench_model(asked), print_models
    if json:
        print_json(found)
    else:
        shown(found)


def _refuse(options: Mapping[str, object], why: str) -> None:
    """See that none of them was given."""
    for option, value in options.items():
        if value is not None:
            raise typer.BadParameter(f"{option}: {why}")


def _linears(
    shape: list[str] | None, rows: list[int] | None, formats: list[str], mode: Mode, threads: int | None, rounds: int
) -> dict[str, Any]:
    """What `measure` finds."""
    import torch

    from lobcq_fx.benchmarking.comparison import ROWS, SHAPES, Plan
    from lobcq_fx.benchmarking.measure import measure
    from lobcq_fx.cli.console import ProgressBars

    plan = Plan(
        formats=_formats(formats),
        rows=tuple(dict.fromkeys(rows or ROWS)),
        rounds=rounds,
        threads=threads or torch.get_num_threads(),
        mode=mode.value,
    )
    shapes = [_shape(text) for text in dict.fromkeys(shape)] if shape else list(SHAPES)
    with ProgressBars() as progress:
        return measure(shapes, plan, progress)


def _shape(text: str) -> tuple[int, int]:
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"--shape {text}: write NxK, outputs by inputs of a weight, for example 4096x11008")
    return int(match[1]), int(match[2])


def _formats(names: list[str]) -> tuple[FormatSpec, ...]:
    from lobcq_fx.config import LobcqConfig

    specs = [LobcqConfig(format=name).format for name in names]  # type: ignore[arg-type]
    return tuple(dict.fromkeys(specs))


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    console, machine = Console(highlight=False), found["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items() if version)
    load = found["load_average"]
    console.print(
        f"{found['mode'].upper()} on {machine['cpu']}, instruction set [bold]{machine['isa']}[/], {found['threads']}"
        f" thread{'s' if found['threads'] > 1 else ''}; {versions}; load average {load['before']:.1f} before,"
        f" {load['after']:.1f} after",
        soft_wrap=True,
    )
    console.print(_table(found["results"]))
    for line in dict.fromkeys(_not_run_line(one) for one in found["not_run"]):
        console.print(line, markup=False, soft_wrap=True)
    if any(row["rows"] == 1 and not row["cold"] for row in found["results"]):
        console.print("Weights as small as these may be found in a cache at M = 1.", soft_wrap=True)


def _table(results: list[dict[str, Any]]) -> Any:
    """A part for each weight and format, a column for each number of tokens: eight of those fit into 80 columns."""
    from rich.table import Table

    counts = list(dict.fromkeys(row["rows"] for row in results))
    caption = "Peers: their time over ours. Memory speed: a plain read of as many bytes, timed in the same race."
    table = Table(caption=caption, caption_justify="left")
    table.add_column("Weight, format", no_wrap=True)
    for count in counts:
        table.add_column(f"M = {count}", justify="right", no_wrap=True)
    for shape, name in dict.fromkeys((row["shape"], row["format"]) for row in results):
        rows = {row["rows"]: row for row in results if (row["shape"], row["format"]) == (shape, name)}
        table.add_section()
        for title, cell in _lines(f"{shape}, {name}", rows.values()):
            table.add_row(title, *(cell(rows[count]) if count in rows else "-" for count in counts))
    return table


def _lines(weight: str, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Titles of a part's lines, and what makes their cells of a row."""
    yield f"[bold]{weight}[/], ms", lambda row: f"{1e3 * row['seconds']:.3g}"
    yield "  GMAC/s", lambda row: f"{row['gmac_per_second']:.3g}"
    yield "  of memory speed", lambda row: f"{100 * row['read_share']:.0f} %" if "read_share" in row else "-"
    for peer in dict.fromkeys(peer for row in rows for peer in row["speedups"]):
        yield f"  {peer}", partial(_speedup, peer)


def _speedup(peer: str, row: dict[str, Any]) -> str:
    return f"{row['speedups'][peer]:.2f}x" if peer in row["speedups"] else "-"


def _not_run_line(one: dict[str, str]) -> str:
    where = "" if one["reason"].startswith("not installed") else f" on {one['shape']}"
    return f"Not run{where}: {one['peer']} ({one['reason']})"
