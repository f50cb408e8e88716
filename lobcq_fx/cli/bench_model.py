"""`lobcq bench --model`: a language model of one's own, generating on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from lobcq_fx.benchmarking.model_speed import Load, Runner
    from lobcq_fx.cli.inputs import ModelFolder

LONGEST_DEFAULT_PROMPT, MOST_DEFAULT_TOKENS = 128, 32
ONNX_MODEL = "model.onnx"


@dataclass(frozen=True)
class Asked:
    """Folders, and how to measure; None where nothing was said."""

    model: str
    against: str | None
    onnx: Path | None
    prompt_tokens: int | None
    new_tokens: int | None
    threads: int | None
    rounds: int
    plot: Path | None
    overwrite: bool


def bench_model(asked: Asked) -> dict[str, Any]:
    """What `measure_models` finds, and "not_run": "model" and "reason" of what could not run; the plot is drawn.

    Raises:
        BadParameter: lengths that the model does not take, or a plot's name that says no format.
        InputError: a folder is of no model that generates, or there is no matplotlib to plot with.
        OtherTokensError: a model chose other tokens in another run.
    """
    from lobcq_fx.benchmarking.model_speed import measure_models
    from lobcq_fx.cli.console import ProgressBars
    from lobcq_fx.cli.failures import InputError

    given = [one for one in (asked.model, asked.against) if one is not None]
    folders = [_folder(one) for one in given]
    if asked.onnx is not None and not (asked.onnx / ONNX_MODEL).is_file():
        raise InputError(f"--onnx {asked.onnx} holds no {ONNX_MODEL}: pass a folder that `lobcq export onnx` wrote")
    if asked.plot is not None:
        _check_plot(asked.plot, overwrite=asked.overwrite)
    load = _load(folders, asked)
    with ProgressBars() as progress:
        runners = _torch_runners(folders, given, progress)
        exported, not_run = _onnx_runners(asked.onnx, load.threads)
        found = measure_models([*runners, *exported], load, progress) | {"not_run": not_run}
    if asked.plot is not None:
        from lobcq_fx.benchmarking.model_plot import draw

        draw(found, asked.plot)
    return found


def _folder(given: str) -> ModelFolder:
    from lobcq_fx.cli.failures import InputError
    from lobcq_fx.cli.inputs import causal_lm_folder

    if (Path(given).expanduser() / ONNX_MODEL).is_file():
        raise InputError(f"{given} was written by `lobcq export onnx`: pass it as --onnx, and what it was made of here")
    return causal_lm_folder(given)


def _check_plot(path: Path, *, overwrite: bool) -> None:
    from importlib.util import find_spec

    from lobcq_fx.cli.failures import InputError
    from lobcq_fx.cli.outputs import check_file

    if find_spec("matplotlib") is None:
        raise InputError('--plot needs matplotlib: pip install "lobcq-fx[report]"')
    from lobcq_fx.benchmarking.model_plot import SUFFIXES

    if path.suffix not in SUFFIXES:
        raise typer.BadParameter(f"--plot {path}: its name has to end in {', '.join(SUFFIXES)}")
    check_file(path, overwrite=overwrite)


def _load(folders: list[ModelFolder], asked: Asked) -> Load:
    import torch

    from lobcq_fx.benchmarking.model_speed import Load

    longest = min((one.max_length for one in folders if one.max_length), default=None)
    prompt = asked.prompt_tokens or min(LONGEST_DEFAULT_PROMPT, longest // 2 if longest else LONGEST_DEFAULT_PROMPT)
    new = asked.new_tokens or min(MOST_DEFAULT_TOKENS, max(2, longest - prompt) if longest else MOST_DEFAULT_TOKENS)
    if longest is not None and prompt + new > longest:
        raise typer.BadParameter(
            f"--prompt-tokens {prompt} and --new-tokens {new} exceed the {longest} that the model takes: lower one"
        )
    return Load(prompt, new, asked.rounds, asked.threads or torch.get_num_threads())


def _torch_runners(folders: list[ModelFolder], given: list[str], progress: Any) -> list[Runner]:
    """By the names of their folders, or all of the paths where those are the same."""
    from lobcq_fx.benchmarking.model_speed import Runner
    from lobcq_fx.cli.measures import loaded

    models = loaded(folders, [None] * len(folders), progress)
    names = [one.name for one in models]
    if len(set(names)) < len(names):
        names = [f"{path}, {place}." for place, path in enumerate(given, 1)] if len(set(given)) < len(given) else given
    return [Runner(name, one.model) for name, one in zip(names, models, strict=True)]


def _onnx_runners(folder: Path | None, threads: int) -> tuple[list[Runner], list[dict[str, str]]]:
    """The exported model, where there is one and an ONNX Runtime; why not otherwise."""
    from importlib.util import find_spec

    from lobcq_fx.benchmarking.model_speed import Runner

    if folder is None:
        return [], []
    name = f"{folder.resolve().name} (ONNX Runtime)"
    if find_spec("onnxruntime") is None:
        return [], [{"model": name, "reason": 'not installed: onnxruntime, pip install "lobcq-fx[onnx]"'}]
    from lobcq_fx.export import OnnxCausalLM, library

    model = OnnxCausalLM(folder, use_library=library.is_available(), threads=threads)
    return [Runner(name, model, reads=False)], []


def print_models(found: dict[str, Any]) -> None:
    """A table, and what it was measured with."""
    from rich.console import Console

    from lobcq_fx.benchmarking.reading import MODEL_BYTES

    console, load = Console(highlight=False), found["load_average"]
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items() if version)
    console.print(
        f"{found['new_tokens']} tokens behind {found['prompt_tokens']} on {found['cpu']}, {found['threads']}"
        f" thread{'s' if found['threads'] > 1 else ''}; {versions}; load average {load['before']:.1f} before,"
        f" {load['after']:.1f} after",
        soft_wrap=True,
    )
    console.print(_table(found))
    for one in found["not_run"]:
        console.print(f"Not run: {one['model']} ({one['reason']})", markup=False, soft_wrap=True)
    if any(row.get("step_bytes", MODEL_BYTES) < MODEL_BYTES for row in found["results"]):
        console.print("Models as small as these may be found in a cache, which is read faster.", soft_wrap=True)


def _table(found: dict[str, Any]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    caption = (
        "Tokens a second of generate(), until the first new token and from there on; in parentheses how many times as"
        " fast the first model is. Memory allows: how often a second a step's weights, keys and values could be read at"
        f" {found['read_gb_per_second']:.1f} GB/s, a plain read's in the same rounds."
    )
    table = Table(caption=caption, caption_justify="left")
    table.add_column("Model", overflow="fold")
    for title in ("Prompt", "Decode", "Reads a step", "Memory allows"):
        table.add_column(title, justify="right")
    for place, row in enumerate(found["results"]):
        speeds = [
            f"{row[f'{what}_tokens_per_second']:.1f}" + (f" ({row['speedups'][what]:.2f}x)" if place else "")
            for what in ("prefill", "decode")
        ]
        table.add_row(escape(row["model"]), *speeds, *_roofline(row))
    return table


def _roofline(row: dict[str, Any]) -> tuple[str, str]:
    from lobcq_fx.inventory import readable_size

    if "step_bytes" not in row:
        return "-", "-"
    limit, share = row["roofline_tokens_per_second"], row["roofline_share"]
    return readable_size(row["step_bytes"]), f"{limit:.1f} ({100 * share:.0f} %)"
