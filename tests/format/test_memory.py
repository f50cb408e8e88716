"""Encoding works a chunk at a time: its memory beyond the outputs does not grow with the input."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEMORY_SCRIPT = """
import sys
import torch
from lobcq_fx.format import FormatSpec, encode, universal_codebooks

def peak_mib():
    # The high-water mark of this process alone: getrusage's starts from the parent's after a fork.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

torch.set_num_threads(1)
x = torch.empty(4096, 4096, dtype=getattr(torch, sys.argv[1]))
for start in range(0, 4096, 64):
    x[start : start + 64] = torch.randn(64, 4096)
spec, codebooks = FormatSpec(8, 64), universal_codebooks(8)
loaded = peak_mib()
encode(x[:64], spec, codebooks)
one_chunk = peak_mib()
encoded = encode(x, spec, codebooks)
print(one_chunk - loaded, peak_mib() - one_chunk - encoded.nbytes / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory high-water mark from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_working_memory_does_not_grow_with_the_input(dtype):
    """[4096, 4096] is 64 chunks; anything of its size in fp32 or int32 would take 64 MiB."""
    run = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT, dtype], capture_output=True, text=True, check=True)
    one_chunk, beyond_outputs = map(float, run.stdout.split())
    assert one_chunk < 100  # MiB; 30 of working memory, the rest is code paged in at the first call
    assert beyond_outputs < 32
