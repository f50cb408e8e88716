"""What a loaded model takes: its packed bytes, once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.index import PIECE
from lobcq_fx.storage.stored_tensors import READ_AT_ONCE, _read
from tests.passes.graphs import values

PROCESS = """
import gc, re, sys
from pathlib import Path
import torch
import lobcq_fx

def resident(which="VmRSS"):
    gc.collect()
    return 1024 * int(re.search(which + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

x = torch.ones(2, 2048)
small, large = sys.argv[1:]
lobcq_fx.load(small)(x)  # imports, the core, threads
before = resident()
q = lobcq_fx.load(large)
loaded = resident() - before
peak = resident("VmHWM") - before
q(x)
print(loaded, resident() - before, peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("float_layers", [(), ("32",)], ids=["packed", "most of it in float"])
def test_a_loaded_model_holds_its_packed_bytes_once(tmp_path, float_layers):
    sizes = {}
    for name, layers in (("small", 1), ("large", 32)):
        torch.manual_seed(0)
        shapes = [(2048, 2048)] * layers + [(2048, 16384) for _ in float_layers if name == "large"]
        model = nn.Sequential(*[nn.Linear(*shape, bias=False) for shape in shapes])
        q = lobcq_fx.quantize(model.eval(), config=LobcqConfig(exclude=float_layers), example_inputs=values(2, 2048))
        q.save_pretrained(tmp_path / name)
        sizes[name] = (tmp_path / name / "lobcq.safetensors").stat().st_size
    command = [sys.executable, "-c", PROCESS, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, used, peak = (int(number) for number in done.stdout.split())
    assert loaded < 1.1 * sizes["large"]
    assert used < 1.1 * sizes["large"]
    # What is repacked is there twice, and a piece of what is copied.
    assert peak < 1.1 * sizes["large"] + READ_AT_ONCE + 8 * 2**20


@pytest.mark.parametrize("place", [(0, 0), (0, PIECE), (5, PIECE + 1)], ids=["gone", "smaller", "cut"])
def test_a_large_tensor_that_is_not_where_it_was_is_no_tensor(tmp_path, place):
    content = torch.arange(PIECE + 1, dtype=torch.int64).to(torch.uint8)
    (tmp_path / "file").write_bytes(content.numpy().tobytes())
    found = torch.zeros_like(content)
    _read(tmp_path / "file", (0, PIECE + 1), found)
    assert torch.equal(found, content)
    with pytest.raises(CheckpointError, match=r"file was changed while it was read. Remedy: load it again"):
        _read(tmp_path / "file", place, found)


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*file: .*No such file"):
        _read(tmp_path / "file", (0, 8), torch.zeros(8, dtype=torch.uint8))
