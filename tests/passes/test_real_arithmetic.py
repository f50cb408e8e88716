"""Complex arithmetic in real numbers: the same results, and nothing complex left; or the graph as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lobcq_fx.passes.real_arithmetic import RealArithmetic
from tests.passes.graphs import Function, assert_metadata, assert_unchanged, graph_of, names, run, values

HEADS, WIDTH = 4, 16


def angles(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None] * torch.linspace(1, 0.1, WIDTH // 2)


def pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(x.shape[0], -1, HEADS, WIDTH // 2, 2))


def rotary(m, x):
    """As Llama 4 and DeepSeek-V2 write it."""
    frequencies = torch.polar(torch.ones_like(angles(x)), angles(x)) * 1.5
    frequencies = frequencies.to(x.device)[None][:, :, None, :]
    return torch.view_as_real(pairs(x) * frequencies).flatten(3).type_as(x)


def stored(m, x):
    """As image transformers write it: the frequencies are a buffer."""
    return torch.view_as_real(pairs(x) * m.frequencies[: x.shape[1]].unsqueeze(-2)).flatten(-2)


def conjugates_and_sums(m, x):
    z = pairs(x).transpose(-1, -2)
    half = x[..., : HEADS * WIDTH // 2]
    w = torch.complex(half.sin(), half.cos()).reshape(x.shape[0], x.shape[1], WIDTH // 2, HEADS)
    z = torch.cat([z * w.conj() + w, -z / x[..., :1, None], w.permute(0, 1, -2, 3) - z], dim=-1)
    return torch.view_as_real(z.select(-1, 3)).square() + z.to(torch.complex128).real.sum(-1, keepdim=True).float()


def chosen_and_widened(m, x):
    z = pairs(x)[:, torch.tensor([2, 0])].expand(x.shape[0], 2, HEADS, WIDTH // 2).clone()
    return z.imag * 2, torch.view_as_real(z.to(torch.complex128)).float()


class Stored(Function):
    def __init__(self, forward) -> None:
        super().__init__(forward)
        angle = values(7, WIDTH // 2)
        self.register_buffer("frequencies", torch.polar(torch.ones_like(angle), angle))


@pytest.mark.parametrize("function", [rotary, stored, conjugates_and_sums, chosen_and_widened])
def test_the_same_in_real_numbers(function):
    model, x = Stored(function), values(2, 5, HEADS * WIDTH)
    graph_module = graph_of(model, x)
    expected = model(x)
    assert RealArithmetic()(graph_module).modified
    torch.testing.assert_close(run(graph_module, x), expected, rtol=1e-6, atol=1e-6)
    assert_metadata(graph_module, x)
    assert not any(node.meta["val"].is_complex() for node in graph_module.graph.nodes if is_tensor(node))
    assert not any(tensor.is_complex() for tensor in graph_module.state_dict().values())
    assert_unchanged(RealArithmetic(), graph_module)


def is_tensor(node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def test_a_stored_tensor_keeps_its_owner():
    graph_module = graph_of(Stored(stored), values(2, 5, HEADS * WIDTH))
    RealArithmetic()(graph_module)
    assert names(graph_module) == {"frequencies_pairs"}
    assert graph_module.frequencies_pairs.shape == (7, WIDTH // 2, 2)


class Complex(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.view_as_real(z * 2)


@pytest.mark.parametrize(
    ("model", "example", "operator"),
    [
        (Function(lambda m, x: torch.view_as_real(pairs(x).exp())), None, "aten.exp"),
        (Function(lambda m, x: torch.view_as_real(torch.fft.rfft(x))), None, "fft"),
        (Function(lambda m, x: torch.view_as_real(pairs(x) + x[..., :1, None])), None, "aten.add"),
        (Function(lambda m, x: torch.view_as_real(pairs(x) * 2j)), None, "aten.mul"),
        (Function(lambda m, x: torch.view_as_real(x[..., :1, None] / pairs(x))), None, "aten.div"),
        (Function(lambda m, x: pairs(x) * 2), None, "return"),
        (Complex(), torch.view_as_complex(values(2, 3, 2)), "placeholder"),
    ],
    ids=["exp", "fft", "complex and real", "complex number", "quotient", "output", "input"],
)
def test_what_else_is_complex_stays(model, example, operator):
    """Also the rotation beside it: a graph that computes with both could not be exported either."""
    graph_module = graph_of(model, values(2, 5, HEADS * WIDTH) if example is None else example)
    one = RealArithmetic()
    assert_unchanged(one, graph_module)
    assert operator in one.refusals[0].format_node()


def test_a_graph_of_real_numbers_stays():
    one, graph_module = RealArithmetic(), graph_of(Function(lambda m, x: x.unsqueeze(-1) * 2 + x[..., None]))
    assert_unchanged(one, graph_module)
    assert not one.refusals
