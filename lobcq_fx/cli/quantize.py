"""`lobcq quantize`: a float model's folder in, a quantized model's folder out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lobcq_fx.cli.options import (
    ActivationFormatOption,
    ActivationScale,
    Attention,
    AttentionOption,
    Dtype,
    FormatOption,
    JsonOption,
    KvCacheOption,
    LengthOption,
    MaxMemoryOption,
    Mode,
    ModelArgument,
    OverwriteOption,
    Recipe,
    Rotation,
    Rounding,
    SamplesOption,
    Smoothing,
)

if TYPE_CHECKING:
    from lobcq_fx.cli.inputs import ModelFolder
    from lobcq_fx.config import LobcqConfig


def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write.", show_default=False)],
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            help="UTF-8 text to calibrate on: for static scales, fitted codebooks, smoothing, rotation, compensated"
            " rounding, and to measure activations.",
        ),
    ] = None,
    format: FormatOption = "8x64",
    mode: Annotated[
        Mode, typer.Option(help="Quantize weights and activations, to 4 or 8 bits, or weights alone.")
    ] = Mode.w4a4,
    activation_format: ActivationFormatOption = None,
    activation_scale: Annotated[
        ActivationScale, typer.Option(help="A tensor scale for each token, or one calibrated for each layer.")
    ] = ActivationScale.per_token,
    codebooks: Annotated[
        str, typer.Option(metavar="universal|fitted|FILE", help="FILE is one that `lobcq calibrate` wrote.")
    ] = "universal",
    recipe: Annotated[
        Recipe,
        typer.Option(help="fast needs no data; balanced makes up for errors where that costs nothing at run time."),
    ] = Recipe.fast,
    rounding: Annotated[
        Rounding | None,
        typer.Option(
            help="The recipe's; or round weights to the nearest, or make up for their errors.", show_default=False
        ),
    ] = None,
    smoothing: Annotated[
        Smoothing | None,
        typer.Option(
            help="The recipe's; or even out columns of activations against the weight's, where free or everywhere.",
            show_default=False,
        ),
    ] = None,
    rotation: Annotated[
        Rotation | None,
        typer.Option(
            help="The recipe's; or rotate the columns of block arrays where calibration shows a smaller error.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits a scalar of the weights, on the average, spent where calibration shows that results need them:"
            " every layer gets its own mode and formats.",
            show_default=False,
        ),
    ] = None,
    activation_bits: Annotated[
        float | None,
        typer.Option(
            help="The same for activations; the default is --bits, or what the mode takes.", show_default=False
        ),
    ] = None,
    kv_cache: KvCacheOption = None,
    attention: AttentionOption = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Quantize only layers whose name matches; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Leave matching layers in float, besides output heads and routers; repeatable."
        ),
    ] = None,
    default_exclude: Annotated[
        bool,
        typer.Option(
            "--default-exclude/--no-default-exclude",
            help="Leave output heads and routers in float; without, --exclude alone says what stays.",
        ),
    ] = True,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN:SETTING=VALUE[,...]",
            help="Settings of the layers whose name matches, for example '*down_proj:mode=w4a8' or '@head:mode=w4a16'"
            " for output heads; repeatable, the last match wins.",
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of what stays in float; auto is the checkpoint's.")] = Dtype.auto,
    calibration_samples: SamplesOption = 64,
    calibration_length: LengthOption = 512,
    max_memory: MaxMemoryOption = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Split weights of more than this into several files, as transformers does: 5GB or 500MB, for example;"
            " the default is its own, 50GB.",
            show_default=False,
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Quantize a model and save it with its tokenizer, or with its processor where it takes images.

    Without a calibration text nothing needs calibrating: codebooks are universal, each token gets its own scale. The
    model may then be larger than memory, and the same command goes on with what one that was interrupted has done. With
    a text --max-memory does the same.
    Processes that torchrun launches divide the work: torchrun --nproc-per-node 2 -m lobcq_fx quantize DIR -o OUT.
    """
    from lobcq_fx.cli.console import ProgressBars, print_json, speak_for_all
    from lobcq_fx.cli.inputs import model_folder, read_text
    from lobcq_fx.cli.quantizing import quantized_folder
    from lobcq_fx.cli.summary import print_summary, summary
    from lobcq_fx.cli.texts import CalibrationText, check_calibration
    from lobcq_fx.streaming.ranks import rank_and_count

    rank, _ = rank_and_count()
    speak_for_all(first=rank == 0)
    config = _config(
        recipe,
        format,
        mode,
        activation_format,
        activation_scale,
        codebooks,
        rounding,
        smoothing,
        rotation,
        kv_cache,
        attention,
        include,
        (*_default_exclude(default_exclude), *(exclude or ())),
        dict(map(_override, override or ())),
        bits,
        activation_bits,
    )
    folder = model_folder(model)
    _check(config, folder, output, calibrate, max_shard_size, overwrite=overwrite)
    if max_memory is not None and calibrate is None:
        raise typer.BadParameter("--max-memory is for --calibrate TEXT: without one, weights are read one by one")
    if calibrate is not None:
        check_calibration(folder)
    text = CalibrationText(read_text(calibrate)[0], calibration_samples, calibration_length) if calibrate else None
    started = time.perf_counter()
    with ProgressBars() as progress:
        inventory, decided = quantized_folder(folder, output, config, text, dtype, max_memory, max_shard_size, progress)
    if rank:
        return
    result = summary(inventory, decided, output, time.perf_counter() - started, progress.seconds)
    if json:
        print_json({"model": model, **result})
    else:
        measured = not folder.is_encoder_decoder and not folder.takes_images
        print_summary(inventory, result, model, generates=folder.generates_text, measured=measured)


def _check(
    config: LobcqConfig,
    folder: ModelFolder,
    output: Path,
    calibrate: Path | None,
    max_shard_size: str | None,
    *,
    overwrite: bool,
) -> None:
    """Refuse now what would fail after the long work."""
    from lobcq_fx.cli.outputs import check_folder
    from lobcq_fx.codebook_choice import read_codebooks
    from lobcq_fx.config import CALIBRATED, CODEBOOKS
    from lobcq_fx.storage.checkpoint import is_checkpoint
    from lobcq_fx.storage.shards import Shards

    if config.needs_calibration and calibrate is None:
        raise typer.BadParameter(f"{CALIBRATED} need a text: pass --calibrate TEXT")
    Shards.split({}, max_shard_size)
    if config.codebooks not in CODEBOOKS:
        for spec in (config.format, config.activations):
            read_codebooks(Path(config.codebooks), spec)
    needed = _least_size(folder, config) - _begun(output)
    check_folder(output, overwrite=overwrite, needed_bytes=needed, replaceable=is_checkpoint, source=folder.path)


def _config(
    recipe: Recipe,
    format: str,
    mode: Mode,
    activation_format: str | None,
    activation_scale: ActivationScale,
    codebooks: str,
    rounding: Rounding | None,
    smoothing: Smoothing | None,
    rotation: Rotation | None,
    kv_cache: str | None,
    attention: Attention | None,
    include: list[str] | None,
    exclude: tuple[str, ...],
    overrides: dict[str, dict[str, str]],
    bits: float | None,
    activation_bits: float | None,
) -> LobcqConfig:
    from lobcq_fx.config import LobcqConfig

    given = {"rounding": rounding, "smoothing": smoothing, "rotation": rotation, "attention": attention}
    return LobcqConfig.of_recipe(
        recipe.value,
        format=format,
        mode=mode.value,
        activation_format=activation_format,
        activation_scale=activation_scale.value,
        kv_cache=kv_cache,
        codebooks=codebooks,
        include=tuple(include or ("*",)),
        exclude=exclude,
        overrides=overrides,
        bits=bits,
        activation_bits=activation_bits,
        **{name: choice.value for name, choice in given.items() if choice is not None},
    )


def _default_exclude(wanted: bool) -> tuple[str, ...]:
    from lobcq_fx.config import DEFAULT_EXCLUDE

    return DEFAULT_EXCLUDE if wanted else ()


def _override(given: str) -> tuple[str, dict[str, str]]:
    """Pattern and settings of `PATTERN:SETTING=VALUE,...`."""
    pattern, colon, settings = given.rpartition(":")
    pairs = [one.partition("=") for one in settings.split(",")]
    if not (pattern and colon) or any(not (name and equals and value) for name, equals, value in pairs):
        raise typer.BadParameter(f"--override {given!r}: write it as '*down_proj:mode=w4a8,format=16x64'")
    return pattern, {name.strip(): value.strip() for name, _, value in pairs}


def _begun(output: Path) -> int:
    """Bytes that a command that was interrupted has left to go on with."""
    from lobcq_fx.storage.atomic_folder import unfinished

    return sum(file.stat().st_size for file in unfinished(output).rglob("*") if file.is_file())


def _least_size(folder: ModelFolder, config: LobcqConfig) -> int:
    """Bytes that will certainly be written: were the checkpoint fp32 and all of it packed."""
    stored = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.path.glob(pattern))
    return int(stored * config.format.bits_per_scalar / 32)
