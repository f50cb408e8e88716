"""`lobcq eval`: how good a model is by itself, and how close a quantized one stays to the float model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lobcq_fx.cli.options import (
    AttentionOption,
    JsonOption,
    KvCacheOption,
    ModelArgument,
    OverwriteOption,
    cache_arguments,
)

if TYPE_CHECKING:
    from lobcq_fx.cli.console import ProgressBars
    from lobcq_fx.cli.inputs import ModelFolder
    from lobcq_fx.cli.language_models import Windows
    from lobcq_fx.cli.measures import Section

LONGEST_DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Asked:
    """Files to measure on, and how. Sizes in tokens, arguments of a `LobcqCache`; None where nothing was asked for."""

    texts: Sequence[Path]
    multiple_choice: Path | None
    last_word: Path | None
    sts: Path | None
    window: int | None
    stride: int | None
    max_tokens: int | None
    batch_size: int | None
    cache: dict[str, Any] | None

    @property
    def all_texts(self) -> Sequence[Path | None]:
        """The texts; where nothing at all was asked for the embedded model's, which None stands for."""
        others = (self.multiple_choice, self.last_word, self.sts)
        return self.texts or ([None] if not any(others) else [])


def evaluate(
    model: ModelArgument,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="UTF-8 text for perplexity, or lines for an encoder; may be given again. Without any file the embedded"
            " model's held-out text.",
        ),
    ] = None,
    multiple_choice: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='JSON lines: {"context" or "question", "choices", "answer"}.'),
    ] = None,
    last_word: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Texts for their last words: lines, or JSON lines {"text"}.'),
    ] = None,
    sts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='For encoders: lines of the STS Benchmark, or JSON lines {"sentence1", "sentence2", "score"}.',
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="DIR_or_default", help="A second model to compare with: the float one."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens the model sees at once; default: its maximum, up to 1024.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next; default: half a window.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Use only the start of each text.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Items in one call; default: 1 window, 8 choices or last words, 32 sentences."),
    ] = None,
    kv_cache: KvCacheOption = None,
    attention: AttentionOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="JSON file to write the results into as well.")
    ] = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Measure a float or a quantized model, on files of your own.

    With --kv-cache the first model predicts from keys and values in that format, whether it is quantized or not.

    Of a language model: perplexity of texts by a sliding window, with --against also the KL divergence from the second
    model's predictions and how often both find the same token likeliest; multiple choice; last words. Of an encoder:
    cosines to the second model's embeddings, and how its own rank pairs of sentences. docs/evaluation.md says what each
    figure means.
    """
    from lobcq_fx.cli.console import ProgressBars, print_json
    from lobcq_fx.cli.inputs import model_folder
    from lobcq_fx.cli.outputs import check_file, write_json
    from lobcq_fx.cli.scores_table import print_scores

    folders = [model_folder(given) for given in (model, against) if given is not None]
    cache = cache_arguments(kv_cache, attention)
    files = (text or [], multiple_choice, last_word, sts)
    asked = Asked(*files, window, stride, max_tokens, batch_size, cache)
    _check_kinds(folders, asked)
    if output is not None:
        check_file(output, overwrite=overwrite)
    measured = _of_language_models if folders[0].is_causal_lm else _of_encoders
    with ProgressBars() as progress:
        sections = measured(folders, asked, progress)
    identities = [_identity(folder) for folder in folders]
    if cache is not None:
        identities[0] |= {"kv_cache": cache["format"], "attention": cache["attention"]}
    result = {"models": identities, "results": [one.to_dict() for one in sections]}
    if output is not None:
        write_json(output, result)
    if json:
        print_json(result)
    else:
        print_scores(identities, sections)


def _check_kinds(folders: Sequence[ModelFolder], asked: Asked) -> None:
    from lobcq_fx.cli.failures import InputError

    first = folders[0]
    for folder in folders:
        if folder.is_encoder_decoder:
            raise InputError(
                f"{folder.architecture} is an encoder-decoder, whose answers are not measured here: compare what"
                " `lobcq generate` makes of both models, or measure the loss of answers, model(..., labels=...).loss"
            )
    if len({folder.is_causal_lm for folder in folders}) > 1:
        raise InputError(
            f"cannot compare {first.architecture} with {folders[1].architecture}: not the same kind of model"
        )
    if first.is_causal_lm and asked.sts is not None:
        raise typer.BadParameter(f"--sts is for encoders, and {first.architecture} is a language model: pass --text")
    if asked.cache is not None and not first.is_causal_lm:
        raise typer.BadParameter(f"--kv-cache: {first.architecture} keeps no keys and values: leave it out")
    for option, given in (("--multiple-choice", asked.multiple_choice), ("--last-word", asked.last_word)):
        if given is not None and not first.is_causal_lm:
            raise typer.BadParameter(f"{option}: {first.architecture} predicts no next token: pass --text or --sts")
    if not first.is_causal_lm and asked.all_texts and len(folders) == 1:
        raise typer.BadParameter(
            f"{first.architecture} predicts no next token, so it has no perplexity: pass --against FLOAT_DIR, or --sts"
            " FILE alone"
        )


def _of_language_models(folders: Sequence[ModelFolder], asked: Asked, progress: ProgressBars) -> list[Section]:
    from lobcq_fx.cli.inputs import load_tokenizer, read_text
    from lobcq_fx.cli.language_models import LanguageModels, common_token_ids
    from lobcq_fx.cli.measures import Material, loaded
    from lobcq_fx.evaluation import WithLobcqCache, last_word_texts, leading_bos, questions

    # What can be wrong with files and settings shows before a model is loaded.
    texts = [Material(source, content) for content, source in map(read_text, asked.all_texts)]
    choices = _read(asked.multiple_choice, questions)
    words = _read(asked.last_word, last_word_texts)
    tokenizers = [load_tokenizer(folder) for folder in folders]
    windows = _windows(folders, asked, bos=leading_bos(tokenizers[0]) is not None)
    ids = [common_token_ids(tokenizers, one, asked.max_tokens) for one in texts]
    first, *others = loaded(folders, tokenizers, progress)
    if asked.cache is not None:
        first = replace(first, model=WithLobcqCache(first.model, **asked.cache))
    measured = LanguageModels([first, *others], asked.batch_size, progress)
    found = [measured.text(one.source, tokens, windows) for one, tokens in zip(texts, ids, strict=True)]
    found += [measured.questions(one) for one in choices]
    return found + [measured.last_words(one) for one in words]


def _of_encoders(folders: Sequence[ModelFolder], asked: Asked, progress: ProgressBars) -> list[Section]:
    from lobcq_fx.cli.encoders import Encoders
    from lobcq_fx.cli.inputs import load_tokenizer, read_text
    from lobcq_fx.cli.measures import Material, loaded
    from lobcq_fx.evaluation import sentence_pairs

    texts = [Material(source, content) for content, source in map(read_text, asked.all_texts)]
    pairs = _read(asked.sts, sentence_pairs)
    tokenizers = [load_tokenizer(folder) for folder in folders]
    measured = Encoders(loaded(folders, tokenizers, progress), asked.batch_size, progress)
    return [measured.cosines(one) for one in texts] + [measured.sts(one) for one in pairs]


def _read(path: Path | None, reader: Any) -> list[Any]:
    """What the file holds, as the only item; nothing where no file was given."""
    from lobcq_fx.cli.measures import Material

    return [] if path is None else [Material(str(path), reader(path))]


def _windows(folders: Sequence[ModelFolder], asked: Asked, *, bos: bool) -> Windows:
    from lobcq_fx.cli.language_models import Windows

    longest = min(folder.max_length or LONGEST_DEFAULT_WINDOW for folder in folders)
    window = asked.window or min(LONGEST_DEFAULT_WINDOW, longest)
    if any(folder.max_length and window > folder.max_length for folder in folders):
        raise typer.BadParameter(f"--window {window}: the model takes at most {longest} tokens")
    stride = asked.stride or max(1, window // 2)
    if stride > window - bos:
        raise typer.BadParameter(f"--stride {stride} leaves gaps between windows of {window} tokens")
    return Windows(window, stride)


def _identity(folder: ModelFolder) -> dict[str, Any]:
    return {"model": folder.path.resolve().name, "architecture": folder.architecture, "quantized": folder.quantized}
