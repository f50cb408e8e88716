"""ONNX Runtime's own operators in places where they do not compute what they replace, unless mended."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lobcq_fx
from lobcq_fx.export import export_onnx
from tests.export.sessions import Session


class Product(nn.Module):
    """A linear layer's output times a context, transposed over the batch; the other operand is a matrix."""

    def __init__(self, multiply) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.multiply = nn.Linear(64, 64), multiply

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.multiply(self.linear(x), context)


@pytest.mark.parametrize(
    "multiply",
    [
        lambda y, context: y.transpose(0, 1) @ context.sum(0).t(),
        lambda y, context: y.permute(1, 2, 0) @ context.sum(1) / 4,
        lambda y, context: context.sum(2).t() @ y.permute(1, 0, 2) / 4,
        lambda y, context: y.permute(1, 0, 2) @ y.permute(1, 2, 0) / 4,
    ],
    ids=["first behind", "first last", "right", "one rank"],
)
def test_products_of_other_ranks(multiply, tmp_path):
    example = {"x": torch.randn(2, 3, 64), "context": torch.randn(2, 5, 64)}
    q = lobcq_fx.quantize(Product(multiply).eval(), example_inputs=example)
    summary = export_onnx(q, tmp_path / "out", example)
    assert summary.nodes["com.microsoft::FusedMatMul"] == 1
    found, expected = Session(tmp_path / "out")(**example)["output"], q(**example)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
