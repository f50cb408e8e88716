"""quantize_folder(): a folder of float weights in, a folder of packed ones out, whatever fits into memory."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils.hub import convert_file_size_to_int

import lobcq_fx
from lobcq_fx.config import CALIBRATED, LobcqConfig
from lobcq_fx.encoding import EncodedWeight, left_alone, records_of
from lobcq_fx.errors import CalibrationError, CheckpointError, ConfigError
from lobcq_fx.frontends import front_end_of
from lobcq_fx.inventory import Inventory
from lobcq_fx.leftovers import inventory_of
from lobcq_fx.model_card import ModelCard
from lobcq_fx.pipeline import Calls, Progress, example_and_data, settings_of, silent
from lobcq_fx.storage.atomic_folder import MODEL, check_target
from lobcq_fx.storage.checkpoint import (
    INVENTORY,
    check_written,
    is_checkpoint,
    json_bytes,
    write_descriptions,
)
from lobcq_fx.storage.index import TensorDigest, digested
from lobcq_fx.storage.shards import Shards
from lobcq_fx.storage.weights_file import weights_files
from lobcq_fx.streaming.calibrated import Calibrated, Calibration, digest_of_calls
from lobcq_fx.streaming.emission import Emission, Outline, emit
from lobcq_fx.streaming.float_folder import FloatFolder, changed
from lobcq_fx.streaming.ranks import Ranks, joined
from lobcq_fx.streaming.skeleton import Skeleton
from lobcq_fx.streaming.together import one_folder, transfer_together
from lobcq_fx.streaming.transfer import Finished, Parameters
from lobcq_fx.tracing.autocast import no_autocast
from lobcq_fx.tracing.trace import MAIN


@no_autocast()
def quantize_folder(
    folder: str | Path,
    output: str | Path,
    config: LobcqConfig | None = None,
    example_inputs: Any = None,
    *,
    calibration_data: Iterable[Any] | None = None,
    recipe: str | None = None,
    dtype: str = "auto",
    static_cache: bool = True,
    max_shard_size: int | str | None = None,
    tokenizer: Any = None,
    max_memory: int | str | None = None,
    progress: Progress | None = None,
) -> Inventory:
    """Quantize a transformers model that may be larger than memory, from folder to folder.

    Writes what `quantize(model, calibration_data, config).save_pretrained(output, tokenizer)` would, byte for byte. The
    model is traced, and its graphs are compared with it, on stand-ins for its weights, which are then read weight by
    weight; with calibration data segment by segment, a part of a layer or a few layers, through which all calls go
    together. The quantized model is not run: what is written is read back, and its graphs are rehearsed.

    A call that is killed, or fails, leaves what it has done beside `output`; the same call goes on with it, and does
    again at most what was under way.

    In processes that torchrun has launched, or of an initialized process group, all have to call this; they divide the
    work, in a folder on a file system that all of them see, and what is written is the same.

    Args:
        folder: a float model with its weights in safetensors, as `save_pretrained` of transformers writes them.
        output: new, empty, or a folder written by this package, which is replaced as a whole.
        config, recipe: as `quantize` takes them; what looks at all layers before the first is encoded is refused:
            fitted codebooks and budgets of bits.
        example_inputs, static_cache: as `quantize` takes them.
        calibration_data: as `quantize` takes it. All of it is held in memory.
        dtype: of what stays in float, a torch name; `"auto"` is the checkpoint's.
        max_shard_size: of a file of weights, as `save_pretrained` takes it.
        tokenizer: saved beside the weights if given.
        max_memory: what calibration has, in bytes or as `"8GB"`: half for the float weights of a segment, half for what
            calls hold between segments, of which the rest is put on the disk. None: 256 MiB of weights in a segment,
            all that calls hold in memory. Second moments of a segment's activations, and what encoding one weight
            takes, come on top.
        progress: called as the work goes on; of several processes in the first, with what all have done.

    Returns:
        What became of every matmul.

    Raises:
        CalibrationError: the settings need data that are not given, or all layers at once; or a layer saw none.
        CheckpointError: `folder` holds no such model, or is damaged, or changed; `output` cannot be written, or what
            was begun there was begun with other settings.
        NotStreamedError: a model that has to be in memory as a whole.
        TraceError, CallError, ConfigError, LobcqError: as `quantize`.
        RankError: another process of the same launch failed.
        OSError: the disk is full, or fails.
    """
    with joined() as ranks:
        return _quantized(
            ranks, Path(folder), Path(output), settings_of(config, recipe), example_inputs, calibration_data,
            dtype=dtype, static_cache=static_cache, max_shard_size=max_shard_size, tokenizer=tokenizer,
            memory=_bytes_of(max_memory), progress=progress or silent,
        )  # fmt: skip


def _quantized(
    ranks: Ranks,
    folder: Path,
    output: Path,
    config: LobcqConfig,
    example_inputs: Any,
    calibration_data: Iterable[Any] | None,
    *,
    dtype: str,
    static_cache: bool,
    max_shard_size: int | str | None,
    tokenizer: Any,
    memory: int | None,
    progress: Progress,
) -> Inventory:
    """What `quantize_folder` does, in each rank of a launch."""
    _check_settings(config, given=calibration_data is not None)
    Shards.split({}, max_shard_size)  # refuses now what is no size
    report = ranks.reporting(progress)
    if ranks.first:
        check_target(output, is_checkpoint, folder)
    source = FloatFolder(folder)
    fingerprint = source.fingerprint()
    report("load", 0, 1)
    skeleton = Skeleton.of(source, dtype)
    report("load", 1, 1)
    provenance = skeleton.provenance
    example_inputs, data = example_and_data(front_end_of(skeleton.model), example_inputs, calibration_data)
    outline = Outline.of(skeleton, config, example_inputs, static_cache=static_cache, progress=report)
    del skeleton
    calls = None if data is None else list(Calls(outline.planned.tried.traced.graphs[MAIN], data))
    work = {"release": lobcq_fx.__version__, "settings": config.to_dict(), "dtype": dtype, **fingerprint}
    work["max_shard_size"] = max_shard_size
    work["configuration, graphs or codebooks"] = outline.digest()
    work["calibration data"] = None if calls is None else digest_of_calls(calls)
    work["memory for segments"] = memory
    ranks.check_same(work)
    written: dict[str, Any] = {}
    with one_folder(ranks, output) as place:
        calibrated = None
        if calls is not None:
            calibrated = Calibration(source, dtype, outline, place, memory).run(calls, ranks, work, report)
            del calls
        emission = emit(outline, None if calibrated is None else calibrated.made, max_shard_size)
        del outline
        gc.collect()  # graphs refer to themselves, and to the memory of their parameters
        done = transfer_together(ranks, place, work, Parameters(source, dtype, provenance, emission), report)
        different = changed(fingerprint, source.fingerprint())
        if different:
            raise CheckpointError(f"{folder} was changed while it was read: {', '.join(different)}")
        report("save", 0, 1)
        if ranks.first:
            inventory = _inventory(emission, calibrated, done)
            written = inventory.to_dict()
            companions = [ModelCard(inventory, config, emission.config, output), emission.generation_config]
            _complete(place / MODEL, emission, calibrated, done, inventory, [*companions, tokenizer])
    report("save", 1, 1)
    return Inventory.from_dict(ranks.shared(lambda: written))


def _check_settings(config: LobcqConfig, *, given: bool) -> None:
    if config.needs_calibration and not given:
        raise CalibrationError(
            f"{CALIBRATED} need data. Remedy: pass calibration_data, or leave out {', '.join(config.calibrated)}"
        )
    if config.bits is not None or config.codebooks == "fitted":
        raise CalibrationError(
            f"{'a budget of bits' if config.bits is not None else 'fitted codebooks'} need all layers at once, and so a"
            " model in memory. Remedy: leave out max_memory, or call lobcq_fx.quantize(model, calibration_data, config)"
        )


def _bytes_of(max_memory: int | str | None) -> int | None:
    if max_memory is None:
        return None
    try:
        found: int = convert_file_size_to_int(max_memory)
    except ValueError:
        found = 0
    if found <= 0:
        raise ConfigError(f"max_memory={max_memory!r}: pass a number of bytes, or a text such as '8GB' or '512MiB'")
    return found


def _inventory(emission: Emission, calibrated: Calibrated | None, done: Mapping[str, Finished]) -> Inventory:
    if calibrated is not None:
        found = calibrated.records
        records = tuple(found.get(one) or left_alone(one) for one in emission.plan.matmuls)
        return inventory_of(records, *emission.size)
    results = {}
    for name, use in emission.uses.items():
        for weight, float_bytes in use.weights:
            results[weight] = EncodedWeight(float_bytes, *done[name].encoded[weight.stored])
    return inventory_of(records_of(emission.plan, results, emission.codebooks, {}), *emission.size)


def _complete(
    folder: Path,
    emission: Emission,
    calibrated: Calibrated | None,
    done: Mapping[str, Finished],
    inventory: Inventory,
    companions: list[Any],
) -> None:
    """Write the rest, and read all of it back."""
    digests = {name: one for finished in done.values() for name, one in finished.tensors.items()}
    contents = {**emission.descriptions, INVENTORY: json_bytes(inventory.to_dict())}
    with weights_files(folder, emission.shards.files, emission.tensors) as files:
        for name, tensor, digest in _rest(emission, calibrated):
            files.write(name, tensor)
            digests[name] = digest
        in_order = {name: digests[name] for name in emission.tensors}
        write_descriptions(folder, contents, [one for one in companions if one is not None], in_order)
        emission.front_end.read(check_written(folder, files.digest), folder)


def _rest(emission: Emission, calibrated: Calibrated | None) -> Iterator[tuple[str, Tensor, TensorDigest]]:
    """What was not made of one parameter alone, by name, with its digest."""
    for name, tensor in emission.ready.items():
        yield name, tensor, digested(tensor)
    if calibrated is not None:
        yield from (one for one in calibrated.tensors() if one[0] in emission.tensors)
