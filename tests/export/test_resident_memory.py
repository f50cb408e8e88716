"""What a session with the op library takes: the packed bytes, once, though ONNX Runtime keeps its own weights."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.export import export_onnx
from lobcq_fx.kernels.cpu.installed import cpu_core

PROCESS = """
import re, sys
from pathlib import Path
import numpy as np
import onnxruntime as ort
from lobcq_fx.export import register

def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def session(folder):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    register(options)
    return ort.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])

x = np.ones((2, 2048), np.float32)
small, large = sys.argv[1:]
one = session(small)
name = one.get_inputs()[0].name
one.run(None, {name: x})  # imports, the core, threads
before = resident()
other = session(large)
created = resident() - before
other.run(None, {name: x})
print(created, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and pages are given back on Linux alone")
@pytest.mark.skipif(cpu_core() is None, reason="the CPU core was not built, or is switched off")
def test_a_session_holds_the_packed_bytes_once(tmp_path):
    sizes = {}
    for name, layers in (("small", 1), ("large", 24)):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(layers)])
        x = torch.randn(2, 2048)
        sizes[name] = export_onnx(lobcq_fx.quantize(model.eval(), example_inputs=x), tmp_path / name, x).size
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    created, used = (int(number) for number in done.stdout.split())
    assert created < 1.15 * sizes["large"]
    assert used < 1.15 * sizes["large"]
