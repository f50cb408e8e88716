"""`lobcq calibrate`: codebooks fitted to a model and a text, as a file that `lobcq quantize --codebooks` reads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lobcq_fx.cli.options import (
    FormatOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OverwriteOption,
    SamplesOption,
    TextOption,
)

if TYPE_CHECKING:
    from lobcq_fx.cli.inputs import ModelFolder
    from lobcq_fx.cli.texts import CalibrationText
    from lobcq_fx.codebook_choice import ModelFit
    from lobcq_fx.config import LobcqConfig


def calibrate(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="JSON file to write.", show_default=False)
    ],
    text: TextOption = None,
    format: FormatOption = "8x64",
    samples: SamplesOption = 64,
    length: LengthOption = 512,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Fit one set of codebooks to a model's weights and to its activations on a text.

    Use it with `lobcq quantize --codebooks FILE`. On little text the universal codebooks are usually better.
    """
    from lobcq_fx.cli.console import print_json
    from lobcq_fx.cli.inputs import model_folder, read_text
    from lobcq_fx.cli.outputs import check_file, write_json
    from lobcq_fx.cli.texts import CalibrationText, check_calibration
    from lobcq_fx.config import LobcqConfig

    config = LobcqConfig(format=format)  # type: ignore[arg-type]
    folder = model_folder(model)
    check_calibration(folder)
    check_file(output, overwrite=overwrite)
    if output.suffix != ".json":
        raise typer.BadParameter(f"-o {output}: give the file a name that ends in .json")
    content, source = read_text(text)
    started = time.perf_counter()
    found = _fit(folder, config, CalibrationText(content, samples, length))
    seconds = round(time.perf_counter() - started, 2)
    provenance = {"model": folder.path.resolve().name, "text": Path(source).name, "format": config.format.name}
    summary = {**provenance, **_quality(found), "seconds": seconds}
    codebooks = {str(config.format.num_codebooks): found.codebooks.tolist()}
    write_json(output, {"written_by": "lobcq calibrate", **summary, "codebooks": codebooks})
    if json:
        print_json({"output": str(output), **summary})
    else:
        fit = found.fit
        kept = "fitted" if found.is_better else "universal, which are better on arrays held out:"
        typer.echo(
            f"Wrote {output}: {config.format.num_codebooks} codebooks, {kept} {found.fitted_db:.2f} dB fitted,"
            f" {found.universal_db:.2f} dB universal; {fit.num_blocks:,} blocks in"
            f" {fit.iterations} iterations; rounding the entries cost {fit.rounding_cost_db:.3f} dB"
        )


def _fit(folder: ModelFolder, config: LobcqConfig, text: CalibrationText) -> ModelFit:
    from lobcq_fx.cli.console import ProgressBars
    from lobcq_fx.cli.inputs import load_float_model, load_tokenizer
    from lobcq_fx.cli.texts import example_call
    from lobcq_fx.pipeline import fit_shared_codebooks

    tokenizer = load_tokenizer(folder)
    with ProgressBars() as progress:
        progress("load", 0, 1)
        model = load_float_model(folder)
        progress("load", 1, 1)
        data = text.batches(tokenizer, causal=folder.is_causal_lm)
        example = None if folder.is_causal_lm else example_call(tokenizer)
        return fit_shared_codebooks(model, data, config.format, config, example, progress=progress)


def _quality(found: ModelFit) -> dict[str, Any]:
    fit = found.fit
    return {
        "chosen": "fitted" if found.is_better else "universal",
        "held_out_db": found.fitted_db,
        "universal_held_out_db": found.universal_db,
        "blocks": fit.num_blocks,
        "iterations": fit.iterations,
        "mse_start": fit.mse_history[0],
        "mse_fitted": fit.mse_history[-1],
        "mse_rounded": fit.mse_rounded,
        "rounding_cost_db": fit.rounding_cost_db,
    }
