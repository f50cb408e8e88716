"""Peak memory and processor time of `quantize_folder`: a Llama-shaped checkpoint of random bf16 weights (Linux only).

python -m benchmarks.scale.streaming                              # 16 GB: the shape of Llama 3 8B
python -m benchmarks.scale.streaming --gigabytes 4 --in-memory    # and `quantize` and `save_pretrained` beside it
python -m benchmarks.scale.streaming --processes 1 2 4            # launched by torchrun, with so many threads each
python -m benchmarks.scale.streaming --resumed                    # killed when half is done, and called again
python -m benchmarks.scale.streaming --gigabytes 4 --calibrated   # and with data, segment by segment
python -m benchmarks.scale.streaming --folder /a/large/disk

Each way runs in processes of its own, whose peak is their VmHWM, what Python and torch take included; of several, the
largest, and the sum of their processor times. What all ways write is compared byte for byte, but for what is
calibrated. Loading what was written is measured too. So are the parts that the way "streamed" cannot do without, each
alone: reading the files plainly, from the disk where the system lets their cached pages go, and encoding the tensors
that are encoded there, from memory, by as many threads as there. Results go into benchmarks/results/streaming.json,
size by size; those of ways that are not run again stay, each with the processor that it was measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import lobcq_fx
from benchmarks.model.memory import status_mib
from lobcq_fx.benchmarking.machine import machine
from lobcq_fx.benchmarking.ours import require_core
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.format import FormatSpec, universal_codebooks
from lobcq_fx.inventory import Inventory
from lobcq_fx.storage.checkpoint import INVENTORY, verify_folder
from lobcq_fx.storage.index import described
from lobcq_fx.storage.weights_file import check_room, weights_file
from lobcq_fx.streaming.workers import WORKERS

RESULT = Path(__file__).parents[1] / "results" / "streaming.json"
SHARD = 2**32
GIB = 2**30
KILLED = "killed"
"""The first half of the way that is resumed."""
FIXED_GIB, LARGEST_TENSORS = 1.5, 2
"""What the peak must stay below: so much, and so many times the largest tensor."""

CALIBRATED, LOADED = "calibrated", "loaded"
PARTS = ("reading", "encoding")
"""Of the step that reads, encodes and writes the weights: what each takes alone."""

PIECE = 2**24
"""Bytes that a plain reader reads at a time, into the same memory."""

CALLS, TOKENS, MAX_MEMORY = 16, 512, 2**31
"""Calibration data, of random tokens, and what the segments and their values get."""


def main() -> None:
    """Make a checkpoint, measure, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=16)
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--resumed", action="store_true")
    parser.add_argument("--calibrated", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where there is room for the float model and the packed one")
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        way, folder = given.worker
        print(json.dumps((measure_part if way in PARTS else measure)(way, folder, given.threads)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        source = make_checkpoint(folder / "float", given.gigabytes)
        several = (f"{count} processes" for count in given.processes if count > 1)
        others = {"in memory": given.in_memory, "resumed": given.resumed}
        ways = ("streamed", *several, *(way for way, wanted in others.items() if wanted))
        found = {way: run(way, folder, given.threads) for way in ways}
        result = source | {"threads": given.threads, "ways": found} | compared(folder, ways)
        if given.calibrated:
            found[CALIBRATED] = run(CALIBRATED, folder, given.threads)
        result["loading"] = run(LOADED, folder, given.threads)
        result["alone"] = {part: run_part(part, folder, given.threads) for part in PARTS}
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"sizes": {}}
    results |= {"machine": machine(), "transformers": version("transformers")}
    before = results["sizes"].get(f"{given.gigabytes:g}", {"ways": {}})
    result["ways"] = before["ways"] | found
    results["sizes"][f"{given.gigabytes:g}"] = before | {name: one for name, one in result.items() if one is not None}
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    peak, bound = found["streamed"]["peak_gib"], result["bound_gib"]
    if peak > bound:
        sys.exit(f"the peak is {peak:.2f} GiB, more than {bound:.2f}")


def make_checkpoint(folder: Path, gigabytes: float) -> dict[str, Any]:
    """A model of the shapes of Llama 3 8B, with as many layers as make so many bytes, written tensor by tensor."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        sizes = {name: one.numel() for name, one in LlamaForCausalLM(config).named_parameters()}
    layer = sum(size for name, size in sizes.items() if ".layers." in name)
    config.num_hidden_layers = max(1, round((gigabytes * 5e8 - sum(sizes.values())) / layer) + 1)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        tensors = {name: one.bfloat16() for name, one in LlamaForCausalLM(config).named_parameters()}
    check_room(folder.parent, {name: described(one) for name, one in tensors.items()})
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, one in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + one.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = one
    folder.mkdir()
    names = [f"model-{place:05}-of-{len(shards):05}.safetensors" for place in range(1, len(shards) + 1)]
    generator = torch.Generator().manual_seed(0)
    for file_name, shard in zip(names, shards, strict=True):
        with weights_file(folder / file_name, {name: described(one) for name, one in shard.items()}) as file:
            for name, one in shard.items():
                values = torch.empty(one.shape, dtype=one.dtype)
                values.fill_(1) if one.dim() == 1 else values.normal_(0, 0.02, generator=generator)
                file.write(name, values)
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    largest = max(one.nbytes for one in tensors.values())
    return {
        "layers": config.num_hidden_layers,
        "parameters": sum(one.numel() for one in tensors.values()),
        "float_gib": sum(one.nbytes for one in tensors.values()) / GIB,
        "largest_tensor_gib": largest / GIB,
        "bound_gib": FIXED_GIB + LARGEST_TENSORS * largest / GIB,
    }


def run(way: str, folder: Path, threads: int) -> dict[str, Any]:
    """`measure` in a process of its own, or in as many as the way has."""
    count, _, _ = way.partition(" processes")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", count, "-m"] if count.isdigit() else []
    command = worker(threads, launcher)
    if way == "resumed":
        killed = subprocess.run([*command, KILLED, str(folder)], stdout=subprocess.DEVNULL)
        assert killed.returncode == -signal.SIGKILL
    started = time.perf_counter()
    done = subprocess.run([*command, way, str(folder)], stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - started
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {
        "seconds": seconds,
        "processor_seconds": sum(one["processor_seconds"] for one in found),
        **{name: max(one[name] for one in found) for name in ("peak_gib", "imported_gib")},
        **{name: max((one[name] for one in found), key=len) for name in found[0] if name.endswith("_after")},
        "cpu": machine()["cpu"],
    }


def measure(way: str, folder: str, threads: int) -> dict[str, Any]:
    """Quantize one way, and say what it took."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    source, output = Path(folder) / "float", Path(folder) / ("resumed" if way == KILLED else way)
    steps, taken, clock = dict[str, float](), dict[str, float](), dict[str, float]()
    if way == LOADED:  # on top of what Python, the modules and the core take
        lobcq_fx.quantize_folder(lobcq_fx.default_model_path(), Path(folder) / "small", static_cache=False)
        lobcq_fx.load(Path(folder) / "small")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls back to what is resident now
    imported = status_mib("VmHWM")
    start, begun = time.process_time(), time.perf_counter()

    def note(step: str, done: int, total: int | None) -> None:
        steps[step], taken[step] = status_mib("VmHWM") / 1024, time.process_time() - start
        clock[step] = time.perf_counter() - begun
        if way == KILLED and step == "encode" and total is not None and 2 * done > total:
            os.kill(os.getpid(), signal.SIGKILL)

    if way == "in memory":
        model = LlamaForCausalLM.from_pretrained(source, dtype="auto").eval()
        lobcq_fx.quantize(model, inplace=True, progress=note).save_pretrained(output)
    elif way == CALIBRATED:
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(1, 128256, (1, TOKENS), generator=generator) for _ in range(CALLS)]
        data = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
        lobcq_fx.quantize_folder(
            source, output, recipe="balanced", calibration_data=data, max_memory=MAX_MEMORY, progress=note
        )
    elif way == LOADED:
        lobcq_fx.load(Path(folder) / "streamed")
    else:
        lobcq_fx.quantize_folder(source, output, progress=note)
    return {
        "processor_seconds": time.process_time() - start,
        "peak_gib": status_mib("VmHWM") / 1024,
        "imported_gib": imported / 1024,
        "peak_gib_after": steps,
        "processor_seconds_after": taken,
        "seconds_after": clock,
    }


def worker(threads: int, launcher: Sequence[str] = ()) -> list[str]:
    """The command of a process that measures; a way or part, and the folder, are to follow."""
    return [sys.executable, "-m", *launcher, "benchmarks.scale.streaming", "--threads", str(threads), "--worker"]


def run_part(part: str, folder: Path, threads: int) -> dict[str, Any]:
    """`measure_part` in a process of its own."""
    done = subprocess.run([*worker(threads), part, str(folder)], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"cpu": machine()["cpu"]}


def measure_part(part: str, folder: str, threads: int) -> dict[str, Any]:
    """Read the float model's files, or encode what was encoded of it, and do nothing else; seconds, of both kinds."""
    torch.set_num_threads(threads)
    require_core()
    files = sorted((Path(folder) / "float").glob("*.safetensors"))
    spent = [0.0, 0.0]

    def timed(work: Callable[[], object]) -> None:
        before = time.perf_counter(), time.process_time()
        work()
        for place, now in enumerate((time.perf_counter(), time.process_time())):
            spent[place] += now - before[place]

    if part == "reading":
        for file in files:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        timed(partial(read_plainly, files))
    else:
        found = Inventory.from_dict(json.loads((Path(folder) / "streamed" / INVENTORY).read_text(encoding="utf-8")))
        formats = {f"{record.layer}.weight": FormatSpec.from_name(str(record.format)) for record in found.quantized}
        with ThreadPoolExecutor(WORKERS) as workers:
            for file in files:
                with safe_open(file, framework="pt") as opened:  # clones are in memory, not in the file's pages
                    weights = [(name, opened.get_tensor(name).clone()) for name in formats.keys() & set(opened.keys())]
                weights.sort(key=lambda named: -named[1].numel())
                jobs = [partial(encoded, name, weight, formats[name]) for name, weight in weights]
                timed(partial(run_all, workers, jobs))
    return {"seconds": spent[0], "processor_seconds": spent[1]}


def encoded(name: str, weight: torch.Tensor, spec: FormatSpec) -> None:
    """Encode a weight, and let what comes of it go."""
    encode_weight(weight, spec, universal_codebooks(spec.num_codebooks), name)


def run_all(workers: Executor, jobs: Sequence[Callable[[], None]]) -> None:
    """Run jobs, until all are done."""
    for done in [workers.submit(job) for job in jobs]:
        done.result()


def read_plainly(files: Sequence[Path]) -> None:
    """All bytes of some files, into the same memory."""
    memory = memoryview(bytearray(PIECE))
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(memory):
                pass


def compared(folder: Path, ways: tuple[str, ...]) -> dict[str, Any]:
    """That what was written is whole, and the same whichever way; its bytes."""
    first, *others = (folder / way for way in ways)
    _, problems = verify_folder(first)
    if problems:
        sys.exit(f"{first} is not whole: {problems[0]}")
    for other in others:
        for file in first.iterdir():
            subprocess.run(["cmp", file, other / file.name], check=True)
    return {
        "packed_gib": sum(file.stat().st_size for file in first.iterdir()) / GIB,
        "same_bytes": bool(others) or None,
    }


if __name__ == "__main__":
    main()
