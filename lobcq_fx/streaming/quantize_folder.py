"""quantize_folder(): a folder of float weights in, a folder of packed ones out, whatever fits into memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lobcq_fx
from lobcq_fx.config import CALIBRATED, LobcqConfig
from lobcq_fx.encoding import EncodedWeight, records_of
from lobcq_fx.errors import CalibrationError, CheckpointError
from lobcq_fx.inventory import Inventory
from lobcq_fx.leftovers import inventory_of
from lobcq_fx.model_card import ModelCard
from lobcq_fx.pipeline import Progress, settings_of, silent
from lobcq_fx.storage.atomic_folder import MODEL, check_target
from lobcq_fx.storage.checkpoint import (
    INVENTORY,
    check_written,
    is_checkpoint,
    json_bytes,
    write_descriptions,
)
from lobcq_fx.storage.index import digest_of, digested
from lobcq_fx.storage.shards import Shards
from lobcq_fx.storage.weights_file import weights_files
from lobcq_fx.streaming.emission import Emission, emit
from lobcq_fx.streaming.float_folder import FloatFolder, changed
from lobcq_fx.streaming.ranks import Ranks, joined
from lobcq_fx.streaming.skeleton import Skeleton
from lobcq_fx.streaming.together import one_folder, transfer_together
from lobcq_fx.streaming.transfer import Finished, Parameters
from lobcq_fx.tracing.autocast import no_autocast


@no_autocast()
def quantize_folder(
    folder: str | Path,
    output: str | Path,
    config: LobcqConfig | None = None,
    example_inputs: Any = None,
    *,
    recipe: str | None = None,
    dtype: str = "auto",
    static_cache: bool = True,
    max_shard_size: int | str | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Inventory:
    """Quantize a transformers model that may be larger than memory, weight by weight, from folder to folder.

    Writes what `quantize(model, config=config).save_pretrained(output, tokenizer)` would, byte for byte. The model is
    traced, and its graphs are compared with it, on stand-ins for its weights. The quantized model is not run: what is
    written is read back, and its graphs are rehearsed.

    A call that is killed, or fails, leaves what it has done beside `output`; the same call goes on with it, and does
    again at most what was under way.

    In processes that torchrun has launched, or of an initialized process group, all have to call this; they divide the
    work, in a folder on a file system that all of them see, and what is written is the same.

    Args:
        folder: a float model with its weights in safetensors, as `save_pretrained` of transformers writes them.
        output: new, empty, or a folder written by this package, which is replaced as a whole.
        config, recipe: as `quantize` takes them; what needs calibration data is refused.
        example_inputs, static_cache: as `quantize` takes them.
        dtype: of what stays in float, a torch name; `"auto"` is the checkpoint's.
        max_shard_size: of a file of weights, as `save_pretrained` takes it.
        tokenizer: saved beside the weights if given.
        progress: called as the work goes on; of several processes in the first, with what all have done.

    Returns:
        What became of every matmul.

    Raises:
        CalibrationError: the settings need data.
        CheckpointError: `folder` holds no such model, or is damaged, or changed; `output` cannot be written, or what
            was begun there was begun with other settings.
        NotStreamedError: a model that has to be in memory as a whole.
        TraceError, CallError, ConfigError, LobcqError: as `quantize`.
        RankError: another process of the same launch failed.
        OSError: the disk is full, or fails.
    """
    with joined() as ranks:
        return _quantized(
            ranks, Path(folder), Path(output), settings_of(config, recipe), example_inputs, dtype=dtype,
            static_cache=static_cache, max_shard_size=max_shard_size, tokenizer=tokenizer, progress=progress or silent,
        )  # fmt: skip


def _quantized(
    ranks: Ranks,
    folder: Path,
    output: Path,
    config: LobcqConfig,
    example_inputs: Any,
    *,
    dtype: str,
    static_cache: bool,
    max_shard_size: int | str | None,
    tokenizer: Any,
    progress: Progress,
) -> Inventory:
    """What `quantize_folder` does, in each rank of a launch."""
    if config.needs_calibration:
        raise CalibrationError(
            f"{CALIBRATED} need calibration data, and a model in memory. Remedy: lobcq_fx.quantize(model,"
            f" calibration_data, config), or leave out {', '.join(config.calibrated)}"
        )
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
    emission = emit(
        skeleton, config, example_inputs, static_cache=static_cache, max_shard_size=max_shard_size, progress=report
    )
    del skeleton
    gc.collect()  # graphs refer to themselves, and to the memory of their parameters
    work = {"release": lobcq_fx.__version__, "settings": config.to_dict(), "dtype": dtype, **fingerprint}
    work["max_shard_size"] = max_shard_size
    work["configuration, graphs or codebooks"] = _digest_of(emission)
    ranks.check_same(work)
    written: dict[str, Any] = {}
    with one_folder(ranks, output) as place:
        done = transfer_together(ranks, place, work, Parameters(source, dtype, provenance, emission), report)
        different = changed(fingerprint, source.fingerprint())
        if different:
            raise CheckpointError(f"{folder} was changed while it was read: {', '.join(different)}")
        report("save", 0, 1)
        if ranks.first:
            inventory = _inventory(emission, done)
            written = inventory.to_dict()
            companions = [ModelCard(inventory, config, emission.config, output), emission.generation_config]
            _complete(place / MODEL, emission, done, inventory, [*companions, tokenizer])
    report("save", 1, 1)
    return Inventory.from_dict(ranks.shared(lambda: written))


def _digest_of(emission: Emission) -> str:
    """Of all that is known before a weight is read."""
    known = {name: digest_of(content) for name, content in emission.descriptions.items()}
    known |= {name: digested(tensor).blake3 for name, tensor in emission.ready.items()}
    return digest_of(json.dumps(known, sort_keys=True).encode())


def _inventory(emission: Emission, done: Mapping[str, Finished]) -> Inventory:
    results = {}
    for name, use in emission.uses.items():
        for weight, float_bytes in use.weights:
            results[weight] = EncodedWeight(float_bytes, *done[name].encoded[weight.stored])
    return inventory_of(records_of(emission.plan, results, emission.codebooks, {}), *emission.size)


def _complete(
    folder: Path,
    emission: Emission,
    done: Mapping[str, Finished],
    inventory: Inventory,
    companions: list[Any],
) -> None:
    """Write the rest, and read all of it back."""
    digests = {name: digested(tensor) for name, tensor in emission.ready.items()}
    for one in done.values():
        digests |= one.tensors
    contents = {**emission.descriptions, INVENTORY: json_bytes(inventory.to_dict())}
    in_order = {name: digests[name] for name in emission.tensors}
    with weights_files(folder, emission.shards.files, emission.tensors) as files:
        for name, tensor in emission.ready.items():
            files.write(name, tensor)
        write_descriptions(folder, contents, [one for one in companions if one is not None], in_order)
        emission.front_end.read(check_written(folder, files.digest), folder)
