"""A quantized model compiled ahead of time, its weights in the program's own file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lobcq_fx import quantize
from lobcq_fx.kernels.bind import weight_layout


class WithSmallConstants(nn.Module):
    """Constants of a few bytes: what AOTInductor lays out behind them starts at any address."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 33), nn.Linear(33, 16)
        self.register_buffer("shift", torch.linspace(-1, 1, 3))
        self.register_buffer("positions", torch.arange(5).unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x + self.shift[1])) + self.positions[:, :2].t())


# torch's own use of what it deprecates.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.skipif(weight_layout(torch.device("cpu")) is None, reason="without the core there is no kernel layout")
def test_a_program_whose_constants_lie_anywhere_gives_the_model_s_results(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64)
    q = quantize(WithSmallConstants().eval(), example_inputs=x)
    with torch.no_grad():
        package = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(torch.export.export(q, (x,)), package_path=package)
        program = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(program(x), q(x), rtol=1e-5, atol=1e-6)
