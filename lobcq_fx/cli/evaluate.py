"""`lobcq eval`: perplexity of a language model, or cosine of an encoder's embeddings to the float model's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lobcq_fx.cli.options import JsonOption, ModelArgument, TextOption

if TYPE_CHECKING:
    from torch import Tensor

    from lobcq_fx.cli.console import ProgressBars
    from lobcq_fx.cli.inputs import ModelFolder

LONGEST_DEFAULT_WINDOW = 1024
LONGEST_SENTENCE = 256


@dataclass(frozen=True)
class Limits:
    """Tokens: of a window, from window to window, and of the text; None where nothing was asked for."""

    window: int | None
    stride: int | None
    max_tokens: int | None


def evaluate(
    model: ModelArgument,
    text: TextOption = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_or_default", help="A second model to compare with: the float one. An encoder needs it."
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens the model sees at once; default: its maximum, up to 1024.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next; default: half a window.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Use only the start of the text.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows or sentences in one call; default: 1 window, 32 sentences.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure a float or a quantized model.

    A language model's perplexity is taken over a text file by a sliding window: each token is scored once, with at
    least window - stride tokens before it. An encoder's score is the mean cosine between its embeddings of the text's
    lines and those of the model given by --against.
    """
    from lobcq_fx.cli.console import ProgressBars, print_json
    from lobcq_fx.cli.inputs import model_folder, read_text

    folders = [model_folder(given) for given in (model, against) if given is not None]
    _check_kinds(folders)
    content, source = read_text(text)
    with ProgressBars() as progress:
        if folders[0].is_causal_lm:
            limits = Limits(window, stride, max_tokens)
            result = _perplexities(folders, content, limits, batch_size or 1, progress)
        else:
            result = _similarity(folders, content, batch_size or 32, progress)
    result = {"measure": "perplexity" if folders[0].is_causal_lm else "cosine", "text": source, **result}
    if json:
        print_json(result)
    else:
        _print(result)


def _check_kinds(folders: list[ModelFolder]) -> None:
    from lobcq_fx.cli.failures import InputError

    first = folders[0]
    if len(folders) == 1 and not first.is_causal_lm:
        raise typer.BadParameter(
            f"{first.architecture} predicts no next token, so it has no perplexity: pass --against FLOAT_DIR"
        )
    if len({folder.is_causal_lm for folder in folders}) > 1:
        raise InputError(
            f"cannot compare {first.architecture} with {folders[1].architecture}: not the same kind of model"
        )


def _perplexities(
    folders: list[ModelFolder], text: str, limits: Limits, batch_size: int, progress: ProgressBars
) -> dict[str, Any]:
    """One model after the other, so that only one is in memory."""
    longest = min(folder.max_length or LONGEST_DEFAULT_WINDOW for folder in folders)
    window = limits.window or min(LONGEST_DEFAULT_WINDOW, longest)
    if any(folder.max_length and window > folder.max_length for folder in folders):
        raise typer.BadParameter(f"--window {window}: the model takes at most {longest} tokens")
    limits = Limits(window, limits.stride or max(1, window // 2), limits.max_tokens)
    rows = [_perplexity(folder, text, limits, batch_size, progress) for folder in folders]
    ratio = {"perplexity_ratio": rows[0]["perplexity"] / rows[1]["perplexity"]} if len(rows) == 2 else {}
    return {"models": rows, **ratio}


def _perplexity(
    folder: ModelFolder, text: str, limits: Limits, batch_size: int, progress: ProgressBars
) -> dict[str, Any]:
    from lobcq_fx.cli.failures import InputError
    from lobcq_fx.cli.inputs import load_model, load_tokenizer
    from lobcq_fx.cli.texts import leading_bos, token_ids
    from lobcq_fx.evaluation import perplexity

    assert limits.window is not None
    assert limits.stride is not None
    tokenizer = load_tokenizer(folder)
    ids = token_ids(tokenizer, text)[: limits.max_tokens]
    bos = leading_bos(tokenizer)
    if limits.stride > limits.window - (bos is not None):
        raise typer.BadParameter(f"--stride {limits.stride} leaves gaps between windows of {limits.window} tokens")
    if len(ids) < 2:
        raise InputError(f"the text is too short: {len(ids)} tokens leave nothing to predict")
    model = load_model(folder)
    started = time.perf_counter()
    found = perplexity(
        model,
        ids,
        window=limits.window,
        stride=limits.stride,
        batch_size=batch_size,
        bos_token_id=bos,
        progress=progress.titled(f"Score {_name(folder)}"),
    )
    seconds = round(time.perf_counter() - started, 2)
    return {**_identity(folder), **found.to_dict(), "bos_before_each_window": bos is not None, "seconds": seconds}


def _similarity(folders: list[ModelFolder], text: str, batch_size: int, progress: ProgressBars) -> dict[str, Any]:
    from lobcq_fx.cli.texts import sentences
    from lobcq_fx.evaluation import cosine_similarity

    lines = sentences(text)
    embeddings = [_embeddings(folder, lines, batch_size, progress) for folder in folders]
    return {"models": [_identity(f) for f in folders], **cosine_similarity(*embeddings).to_dict()}


def _embeddings(folder: ModelFolder, lines: list[str], batch_size: int, progress: ProgressBars) -> Tensor:
    from lobcq_fx.cli.inputs import load_model, load_tokenizer
    from lobcq_fx.evaluation import sentence_embeddings

    return sentence_embeddings(
        load_model(folder),
        load_tokenizer(folder),
        lines,
        batch_size=batch_size,
        max_length=min(LONGEST_SENTENCE, folder.max_length or LONGEST_SENTENCE),
        progress=progress.titled(f"Embed with {_name(folder)}"),
    )


def _name(folder: ModelFolder) -> str:
    return f"{folder.path.resolve().name} ({'quantized' if folder.quantized else 'float'})"


def _identity(folder: ModelFolder) -> dict[str, Any]:
    return {"model": folder.path.resolve().name, "architecture": folder.architecture, "quantized": folder.quantized}


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    first, *others = result["models"]
    if result["measure"] == "cosine":
        console.print(
            f"Cosine of [bold]{first['model']}[/] to [bold]{others[0]['model']}[/] over {result['sentences']} lines of"
            f" {result['text']}: mean [bold]{result['mean_cosine']:.4f}[/], least {result['min_cosine']:.4f}"
        )
        return
    measure = f"Perplexity on {result['text']}, window {first['window']}, stride {first['stride']}"
    console.print(measure, soft_wrap=True, markup=False)
    table = Table()
    for title in ("Model", "Weights", "Perplexity", "Tokens scored", "Seconds"):
        table.add_column(title, justify="left" if title in ("Model", "Weights") else "right")
    for row in result["models"]:
        kind = "LO-BCQ" if row["quantized"] else "float"
        table.add_row(row["model"], kind, f"{row['perplexity']:.4f}", f"{row['tokens']:,}", f"{row['seconds']:.1f}")
    console.print(table)
    if others:
        console.print(f"{100 * (result['perplexity_ratio'] - 1):+.2f} % against {others[0]['model']}")
