"""What `lobcq quantize` does: weight by weight where no text has to be run through the model, else in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.markup import escape

import lobcq_fx
from lobcq_fx.cli.console import ProgressBars, messages
from lobcq_fx.cli.inputs import ModelFolder, load_float_model, load_reader
from lobcq_fx.cli.options import Dtype
from lobcq_fx.cli.outputs import writing
from lobcq_fx.cli.texts import CalibrationText, example_call
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import ConfigError, NotStreamedError
from lobcq_fx.inventory import Inventory
from lobcq_fx.storage.atomic_folder import unfinished
from lobcq_fx.streaming.float_folder import has_safetensors
from lobcq_fx.streaming.ranks import rank_and_count


def quantized_folder(
    folder: ModelFolder,
    output: Path,
    config: LobcqConfig,
    text: CalibrationText | None,
    dtype: Dtype,
    max_memory: str | None,
    max_shard_size: str | None,
    progress: ProgressBars,
) -> tuple[Inventory, LobcqConfig]:
    """Quantize a folder's model into another folder.

    Args:
        max_memory: calibrate segment by segment in so much of it; None in memory.

    Returns:
        What became of every matmul, and the settings that were decided on.
    """
    reader = load_reader(folder, required=text is not None)
    made_up = folder.generates_text or folder.is_encoder_decoder or reader is None
    example = None if made_up else example_call(reader)
    _, count = rank_and_count()
    if count > 1 and not has_safetensors(folder.path):
        raise ConfigError(f"{count} processes divide a model in safetensors, and no other. Remedy: leave torchrun out")
    data = None if text is None else text.batches(reader, causal=folder.is_causal_lm)
    if count > 1 or max_memory is not None or (data is None and has_safetensors(folder.path)):
        try:
            with _saying_what_is_kept(output):
                inventory = lobcq_fx.quantize_folder(
                    folder.path, output, config, example, calibration_data=data, dtype=dtype.value,
                    max_shard_size=max_shard_size, tokenizer=reader, max_memory=max_memory, progress=progress,
                )  # fmt: skip
        except NotStreamedError as error:
            if count > 1 or max_memory is not None:
                raise
            messages.print(f"[dim]{escape(str(error))}: the whole model is loaded[/]")
        else:
            return inventory, config
    progress("load", 0, 1)
    model = load_float_model(folder, dtype.value)
    progress("load", 1, 1)
    quantized = lobcq_fx.quantize(model, data, config, example, inplace=True, progress=progress)
    progress("save", 0, 1)
    with writing(output):
        quantized.save_pretrained(output, reader, max_shard_size=max_shard_size)
    progress("save", 1, 1)
    return quantized.inventory, quantized.lobcq_config


@contextmanager
def _saying_what_is_kept(output: Path) -> Iterator[None]:
    """However it ends."""
    try:
        yield
    except BaseException:
        if unfinished(output).exists():
            messages.print(
                f"[dim]What is done is in {escape(str(unfinished(output)))}: the same command goes on with it[/]"
            )
        raise
