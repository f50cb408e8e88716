"""Which kernels CUDA tensors get. In processes of their own: a registration lasts as long as the process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

HAS_KERNEL = "torch._C._dispatch_has_kernel_for_dispatch_key"
PREPACKED = (
    "residual", "float_activation", "float_activation_residual", "silu_mul", "rms_norm", "add_rms_norm", "layer_norm",
)  # fmt: skip
OPS = (
    "quantize_activation",
    "linear",
    "linear.float_activation",
    "linear_prepacked",
    *(f"linear_prepacked.{overload}" for overload in PREPACKED),
    "grouped_linear",
    "grouped_linear_prepacked",
    "grouped_linear_prepacked.float_activation",
)

PRETENDED = """
import logging, sys
import torch
logging.basicConfig(format="%(message)s")
torch.cuda.is_available = lambda: {available}
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_name = lambda index: f"GPU {{index}}"
torch.cuda.get_device_capability = lambda index: ((9, 0), {second})[index]
{before}
from lobcq_fx.kernels.bind import weight_layout
layouts = [type(weight_layout(torch.device("cuda", index))).__name__ for index in (0, 1)]
print(layouts, [torch._C._dispatch_has_kernel_for_dispatch_key("lobcq::" + name, "CUDA") for name in {ops}])
"""


def run(
    available: bool = True, second: tuple[int, int] = (8, 0), before: str = "", switch: str = "1"
) -> tuple[str, str]:
    code = PRETENDED.format(available=available, second=second, before=before, ops=OPS)
    environment = {**os.environ, "LOBCQ_TRITON": switch}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip(), done.stderr


def test_gpus_with_the_instructions_get_the_kernels() -> None:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    out, _ = run()
    assert out == f"['CudaWeightLayout', 'CudaWeightLayout'] {[True] * len(OPS)}"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"switch": "0"}, "LOBCQ_TRITON is not 1"),
        ({"second": (7, 5)}, "GPU 1 has compute capability 7.5, the kernels need 8.0"),
        ({"available": False}, "there is no GPU"),
        ({"before": "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'triton'"
          " else f(n, *a)"}, "triton is not installed"),
    ],
)  # fmt: skip
def test_otherwise_the_defaults_stay_and_one_line_says_why(options: dict, reason: str) -> None:
    out, log = run(**options)
    assert out == f"['NoneType', 'NoneType'] {[False] * len(OPS)}"
    assert log.count(f"{reason}, the ops on CUDA tensors run through plain torch") == 1
