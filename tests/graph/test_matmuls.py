"""find_matmuls: each matmul of a graph once, and the reason where it stays in float."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from lobcq_fx.config import LobcqConfig
from lobcq_fx.graph.matmuls import find_matmuls
from lobcq_fx.passes.fold_weights import FoldWeights
from tests.passes.graphs import Function, aten, linear, normalized, parameter, rewritten, values

W = {"w": parameter(64, 32)}
FORM = "its constant operand is not a 2-D weight on the right"
ADDMM = "addmm with a bias that is not one value per output, or with beta or alpha other than 1"
PRODUCT = "activation x activation, no constant weight"
INDICES = "its indices are not those of rows [..., K] times one constant matrix [N, K]"

REFUSED = {
    "beta": (lambda m, x: torch.addmm(m.b, x, m.w, beta=2), {**W, "b": parameter(32)}, "addmm", ADDMM),
    "2-D bias": (lambda m, x: torch.addmm(m.b, x, m.w), {**W, "b": parameter(4, 32)}, "addmm", ADDMM),
    "bias alone constant": (
        lambda m, x: torch.addmm(m.b, x, x.t() @ x), {"b": parameter(64)}, "addmm", PRODUCT,
    ),
    "3-D weight": (lambda m, x: x[None] @ m.w, {"w": parameter(2, 64, 32)}, "matmul", FORM),
    "3-D weight on the left": (lambda m, x: m.w @ x.t(), {"w": parameter(2, 32, 64)}, "matmul", FORM),
    "activations": (lambda m, x: x @ x.t(), {}, "matmul", PRODUCT),
    "attention": (
        lambda m, x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=m.mask),
        {"mask": parameter(4, 4)}, "scaled_dot_product_attention", PRODUCT,
    ),
    "computed": (lambda m, x: x @ (m.w * 2), W, "matmul", FORM),
    "computed for linear": (
        lambda m, x: nn.functional.linear(x, m.w.t() * 2), W, "linear",
        "its weight is computed in the graph, not constant",
    ),
    "einsum of a matrix for each index": (
        lambda m, x: torch.einsum("mk,mkn->mn", x, m.w), {"w": parameter(4, 64, 32)}, "einsum", INDICES,
    ),
    "einsum of activations": (lambda m, x: torch.einsum("mk,nk->mn", x, x), {}, "einsum", PRODUCT),
    "tensordot of activations": (lambda m, x: torch.tensordot(x, x, dims=([1], [1])), {}, "tensordot", PRODUCT),
    "convolution": (
        lambda m, x: m.c(x[:, None]), {"c": nn.Conv1d(1, 2, 3)}, "conv1d",
        "a convolution whose windows overlap, not a matmul",
    ),
    "convolution of a computed weight": (
        lambda m, x: nn.functional.conv1d(x[None], m.w * 2), {"w": parameter(8, 4, 1)}, "conv1d",
        "a convolution, not a matmul",
    ),
    "transposed convolution": (
        lambda m, x: m.c(x[:, None]), {"c": nn.ConvTranspose1d(1, 2, 3)}, "conv_transpose1d",
        "a transposed convolution, not a matmul",
    ),
    "bilinear": (
        lambda m, x: m.b(x, x), {"b": nn.Bilinear(64, 64, 8)}, "bilinear", "a bilinear form of two activations",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_reasons_reach_the_inventory(case):
    function, members, operation, reason = REFUSED[case]
    graph_module = normalized(Function(function, **members), values(4, 64))
    before = graph_module.code
    result, records = rewritten(graph_module)
    assert not result.modified
    assert graph_module.code == before
    assert (operation, reason) in [(record.operation, record.reason) for record in records]
    assert all(record.format is None and record.float_bytes == record.packed_bytes for record in records)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.narrow, self.lm_head = linear(15, 64), linear(64, 15), linear(8, 64)

    def forward(self, x):
        return self.lm_head(self.narrow(self.up(x)))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LobcqConfig(), {"narrow": "too small: K = 15 is below min_in_features = 16",
                         "lm_head": "excluded by pattern '*lm_head'"}),
        (LobcqConfig(min_in_features=65), {"up": "too small: K = 64 is below min_in_features = 65",
                                           "narrow": "too small: K = 15 is below min_in_features = 65",
                                           "lm_head": "excluded by pattern '*lm_head'"}),
        (LobcqConfig(exclude=(), include=["lm*"]), {"up": "matched by no include pattern",
                                                    "narrow": "matched by no include pattern"}),
        (LobcqConfig(exclude=["up", "u*"], min_in_features=1), {"up": "excluded by pattern 'up'"}),
    ],
)  # fmt: skip
def test_settings_leave_layers_alone_with_a_reason(config, expected):
    _, records = rewritten(normalized(Layers()), config)
    assert [record.layer for record in records] == ["up", "narrow", "lm_head"]
    assert {record.layer: record.reason for record in records if record.reason} == expected
    shapes = {record.layer: record.shape for record in records}
    assert shapes == {"up": (15, 64), "narrow": (64, 15), "lm_head": (8, 64)}


def test_float64_and_integer_weights_are_left_alone():
    double = normalized(linear(32, 64).double(), values(4, 64).double())
    result, (record,) = rewritten(double)
    assert not result.modified
    assert record.reason == "its weight is torch.float64; fp32, bf16 and fp16 are supported"
    integers = nn.Parameter(torch.ones(32, 64, dtype=torch.int32), requires_grad=False)
    model = Function(lambda m, x: nn.functional.linear(x, m.w), w=integers)
    result, (record,) = rewritten(normalized(model, torch.ones(4, 64, dtype=torch.int32)))
    assert not result.modified
    assert record.reason == "its weight is torch.int32; fp32, bf16 and fp16 are supported"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_supported_dtype_is_taken_and_stays_the_result_s(dtype):
    graph_module = normalized(linear(32, 64).to(dtype), values(4, 64).to(dtype))
    result, (record,) = rewritten(graph_module)
    assert result.modified
    assert record.reason is None
    assert graph_module(values(3, 64).to(dtype))[0].dtype == dtype


def test_a_deep_graph_takes_one_walk_however_its_residuals_branch():
    """As many ways lead back to the input as there are subsets of its layers, and more than Python nests calls."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in range(1500):
        node = graph.call_function(aten.add.Tensor, (node, node))
    product = graph.call_function(aten.matmul.default, (node, node))
    graph.output((product,))
    graph_module = fx.GraphModule(nn.Module(), graph)
    (matmul,) = find_matmuls(graph_module)
    assert matmul.obstacle == PRODUCT
    assert not FoldWeights()(graph_module).modified
