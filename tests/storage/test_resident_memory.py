"""What a loaded model takes: its packed bytes, once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.storage.stored_tensors import READ_AT_ONCE
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
def test_a_loaded_model_holds_its_packed_bytes_once(tmp_path):
    sizes = {}
    for name, layers in (("small", 1), ("large", 32)):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(layers)])
        q = lobcq_fx.quantize(model.eval(), example_inputs=values(2, 2048))
        q.save_pretrained(tmp_path / name)
        sizes[name] = (tmp_path / name / "lobcq.safetensors").stat().st_size
    command = [sys.executable, "-c", PROCESS, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, used, peak = (int(number) for number in done.stdout.split())
    assert loaded < 1.1 * sizes["large"]
    assert used < 1.1 * sizes["large"]
    assert peak < 1.1 * sizes["large"] + READ_AT_ONCE + 8 * 2**20  # what is repacked is there twice
