"""Complex numbers in exported models: rotary embeddings are written in real ones, the rest is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lobcq_fx
from lobcq_fx.errors import ExportError
from lobcq_fx.export import export_onnx
from tests.export.sessions import Session
from tests.sweeps import sweep


class Rotated(nn.Module):
    """Rotates by computed and by stored angles, as Llama 4 and image transformers do."""

    def __init__(self, compute=lambda z: z) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.out, self.compute = nn.Linear(64, 64), nn.Linear(64, 64), compute
        angles = torch.randn(9, 8)
        self.register_buffer("frequencies", torch.polar(torch.ones_like(angles), angles), persistent=False)
        self.register_buffer("steps", torch.linspace(1, 0.1, 8))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(self.linear(x).unflatten(-1, (4, 8, 2)))
        angles = torch.arange(x.shape[1])[:, None] * self.steps
        z = z * torch.polar(torch.ones_like(angles), angles)[:, None] * self.frequencies[: x.shape[1], None]
        return self.out(torch.view_as_real(self.compute(z)).flatten(2))


@pytest.mark.parametrize("loaded", sweep([False, True], [True]))
def test_rotary_embeddings(tmp_path, loaded):
    """As traced, and loaded, which export alike."""
    x = torch.randn(2, 5, 64)
    q = lobcq_fx.quantize(Rotated().eval(), example_inputs=x)
    q.save_pretrained(tmp_path / "packed")
    summary = export_onnx(lobcq_fx.load(tmp_path / "packed") if loaded else q, tmp_path / "out", x)
    assert summary.nodes["lobcq::Linear"] == 2
    found = Session(tmp_path / "out")(x=x[:1, :3])["output"]
    torch.testing.assert_close(found, q(x[:1, :3]), rtol=1e-4, atol=1e-4)


def test_what_else_is_complex_is_named(tmp_path):
    x = torch.randn(2, 5, 64)
    q = lobcq_fx.quantize(Rotated(lambda z: z.exp()).eval(), example_inputs=x)
    with pytest.raises(ExportError, match=r"computes aten\.exp\.default, which follows frequencies, in complex"):
        export_onnx(q, tmp_path / "out", x)
    assert not list(tmp_path.iterdir())
