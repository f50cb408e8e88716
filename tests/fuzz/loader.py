"""Damage saved folders at random, digests renewed, and load them: `python -m tests.fuzz.loader --inputs 100000`.

Each must be a CheckpointError, or a model that answers a call. Anything else, a crash or a hang is a finding: the seed
of the input is printed, and `--seed` with `--inputs 1` makes it again.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import logging
import resource
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import blake3
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.errors import CallError, CheckpointError
from lobcq_fx.storage.index import INDEX
from tests.fuzz.results import options, report

SECONDS = 20
"""For one input."""

MEMORY = 16 * 2**30

GRAPH, CONFIG, INVENTORY, WEIGHTS = "graph.json", "config.json", "inventory.json", "lobcq.safetensors"

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**20, 2**31, -(2**31), 2**62, 2**63, 2**64, 10**40, 0.5, -1e30, "", "x",
    "self", "torch", "__class__", "ops.aten.relu.default", "ops.aten.add.Tensor", "operator.pow", "operator.getitem",
    "forward", "graph", "float16", [], [[]], {}, {"node": "x"}, {"tuple": []}, {"dtype": "float16"}, {"dtype": "load"},
    {"device": "cuda:0"}, {"device": "meta"}, {"float": "nan"}, {"slice": [None, None, 0]}, "\\ud800", "\\x00",
)  # fmt: skip


def main() -> None:
    given = options(__doc__, "inputs", 100_000)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(Path(folder), range(given.seed, given.seed + given.inputs))
    found, answered = counts["found"], counts["answered"]
    report("loader", tried=given.inputs, lost=found, record=given.record, answered=answered, refused=counts["refused"])


class Mlp(nn.Module):
    """Of what mutations can hit: a norm, attention, sizes, constants, a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> dict[str, Any]:
        heads = self.norm(torch.relu(self.up(x))).view(x.shape[0], x.shape[1], 2, 32).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        mask = torch.arange(x.shape[1]) < x.shape[1] // 2 + 1
        return {"out": self.down(attended) * scale, "rest": (attended.mean(), mask[None, :])}


def fuzz(folder: Path, seeds: range) -> Counter[str]:
    """What became of the inputs of the seeds; `found` counts what must not be."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64)
    lobcq_fx.quantize(Mlp().eval(), example_inputs=(x,)).save_pretrained(folder / "q")
    saved = {path.name: path.read_bytes() for path in (folder / "q").iterdir()}
    counts = Counter({"refused": 0, "answered": 0, "call refused": 0, "found": 0})
    signal.signal(signal.SIGALRM, _too_late)
    for seed in seeds:
        sys.stderr.write(f"\rseed {seed} ")  # the last line that a crash leaves
        write(folder / "q", mutated(saved, Random(seed)))
        signal.alarm(SECONDS)
        try:
            counts[outcome(folder / "q", x)] += 1
        except BaseException as error:  # whatever it is, it is a finding
            if isinstance(error, KeyboardInterrupt):
                raise
            counts["found"] += 1
            counts[f"found: {type(error).__name__}"] += 1
            sys.stderr.write(f"{type(error).__name__}: {str(error)[:300]}\n")
        finally:
            signal.alarm(0)
    return counts


@torch.no_grad()
def outcome(folder: Path, x: torch.Tensor) -> str:
    try:
        q = lobcq_fx.load(folder)
    except CheckpointError:
        return "refused"
    try:
        q(x)
    except CallError:
        return "call refused"
    return "answered"


def mutated(saved: dict[str, bytes], rng: Random) -> dict[str, bytes]:
    """The files with one to three changes."""
    files = dict(saved)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice((GRAPH, GRAPH, GRAPH, GRAPH, CONFIG, INVENTORY, WEIGHTS, WEIGHTS))
        if name == WEIGHTS:
            files[name] = rng.choice((_other_header, _other_bytes))(files[name], rng)
        elif rng.random() < 0.05:
            files[name] = _other_bytes(files[name], rng)
        else:
            files[name] = _other_json(files[name], rng)
    return files


def write(folder: Path, files: dict[str, bytes]) -> None:
    """With an index that fits, but for tensors that no header describes."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    index = {"files": {n: _digest(files[n]) for n in (CONFIG, GRAPH, INVENTORY)}, "tensors": _tensors(files[WEIGHTS])}
    own = _digest(json.dumps(index, sort_keys=True, separators=(",", ":")).encode())
    (folder / INDEX).write_text(json.dumps({"blake3": own, **index}), encoding="utf-8")


def _tensors(content: bytes) -> dict[str, Any]:
    names = {
        "F32": "float32",
        "U8": "uint8",
        "I8": "int8",
        "F8_E4M3": "float8_e4m3fn",
        "F16": "float16",
        "I64": "int64",
    }
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        header.pop("__metadata__", None)
        return {
            name: {
                "dtype": names.get(one["dtype"], "float32"),
                "shape": one["shape"],
                "blake3": _digest(data[slice(*one["data_offsets"])]),
            }
            for name, one in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        return {}


def _digest(content: bytes) -> str:
    return blake3.blake3(content).hexdigest()


def _other_header(content: bytes, rng: Random) -> bytes:
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = _other_json(content[8 : 8 + length], rng)
    except (ValueError, struct.error):
        return content
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _other_bytes(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 4, 64))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed[: rng.randrange(len(changed))] if changed and rng.random() < 0.1 else changed)


def _other_json(content: bytes, rng: Random) -> bytes:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    places = list(_places(value))
    if not places:
        return content
    holder, key = rng.choice(places)
    _change(holder, key, places, rng)
    return json.dumps(value).encode()


def _places(value: Any) -> Any:
    """(holder, key) of everything within."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _change(holder: Any, key: Any, places: list[Any], rng: Random) -> None:
    kind = rng.randrange(7)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind in (2, 3):
        other, place = rng.choice(places)
        holder[key] = copy.deepcopy(other[place])
    elif kind == 4 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    elif kind == 5 and isinstance(holder[key], (int, float)):
        holder[key] = rng.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2))
    elif kind == 6 and isinstance(holder, dict):
        holder[str(rng.choice(VALUES))] = holder.pop(key)
    else:
        other, place = rng.choice(places)
        holder[key] = copy.deepcopy(other[place])


def _too_late(*_: Any) -> None:
    raise TimeoutError(f"an input takes longer than {SECONDS} seconds")


if __name__ == "__main__":
    main()
