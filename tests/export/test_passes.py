"""The passes that only exports need: what they make of a graph, what they leave, and a second run finds nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import ExportError
from lobcq_fx.export.float32 import ComputeInFloat32
from lobcq_fx.export.kept_positions import FixKeptPositions
from lobcq_fx.export.matmulnbits import LowerToMatMulNBits, UseFloatActivations, matmul_nbits
from lobcq_fx.export.squeezes import SqueezeOnesOnly
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from tests.passes.graphs import (
    Function,
    assert_metadata,
    assert_unchanged,
    aten,
    decoded,
    graph_of,
    linear,
    lobcq,
    names,
    nodes,
    parameter,
    quantized,
    reference,
    run,
    targets,
    values,
)  # fmt: skip

NARROW = (torch.bfloat16, torch.float16)


class Norm(nn.Module):
    """Computes in fp32 and rounds, as Hugging Face models do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", values(64).to(dtype))
        self.register_buffer("steps", torch.arange(64))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() * self.steps
        return self.weight * wide.tanh().to(x.dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_floats_are_widened(dtype):
    graph_module, x = graph_of(Norm(dtype), values(2, 64).to(dtype)), values(2, 64)
    assert ComputeInFloat32()(graph_module).modified
    expected = graph_module.weight * (x * torch.arange(64)).tanh()
    assert graph_module.steps.dtype == torch.int64
    assert torch.equal(run(graph_module, x), expected)
    assert expected.dtype == torch.float32
    assert_unchanged(ComputeInFloat32(), graph_module)


def test_fp32_and_packed_weights_are_not_widened():
    assert_unchanged(ComputeInFloat32(), graph_of(Norm(torch.float32), values(2, 64)))
    graph_module = quantized(lambda m, x: m.layer(x), layer=linear(32, 64))
    assert graph_module.layer.weight.scales.dtype == torch.float8_e4m3fn
    assert_unchanged(ComputeInFloat32(), graph_module)


class Head(nn.Module):
    """Logits of the chosen positions."""

    def __init__(self, read=lambda states, positions: states[:, positions]) -> None:
        super().__init__()
        self.head, self.read = linear(8, 64), read

    def forward(self, states: Tensor, logits_to_keep: Tensor) -> Tensor:
        return self.head(self.read(states, logits_to_keep))


@pytest.mark.parametrize("last_only", [False, True])
def test_all_positions_or_the_last(last_only):
    model, x = Head(), values(2, 5, 64)
    graph_module = graph_of(model, x, torch.arange(2))
    assert FixKeptPositions(last_only)(graph_module).modified
    expected = model.head(x[:, -1:] if last_only else x)
    torch.testing.assert_close(run(graph_module, x), expected, rtol=1e-6, atol=1e-6)
    assert_unchanged(FixKeptPositions(last_only), graph_module)


def test_other_inputs_choose_what_they_like():
    class Other(Head):
        def forward(self, states: Tensor, kept: Tensor) -> Tensor:
            return super().forward(states, kept)

    assert_unchanged(FixKeptPositions(), graph_of(Other(), values(2, 5, 64), torch.arange(2)))


def test_kept_positions_that_are_read_in_another_way_are_named():
    for read in (lambda states, positions: states[positions], lambda states, positions: states + positions.sum()):
        graph_module = graph_of(Head(read), values(2, 5, 64), torch.arange(2))
        with pytest.raises(ExportError, match="the graph reads logits_to_keep in"):
            FixKeptPositions()(graph_module)


def two_layers(mode="w4a4", dtype=torch.float32):
    """Both read one encoded activation; the second has no bias. A float product follows."""
    return quantized(
        lambda m, x: (m.one(x) + m.two(x)) * m.factor,
        LobcqConfig(mode=mode), dtype=dtype, one=linear(32, 64), two=linear(32, 64, bias=False, seed=1),
        factor=parameter(32),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_in_float(dtype):
    graph_module, x = two_layers(dtype=dtype), values(2, 3, 64).to(dtype)
    assert UseFloatActivations()(graph_module).modified
    assert not nodes(graph_module, lobcq.quantize_activation.default)
    assert len(nodes(graph_module, lobcq.linear.float_activation)) == 2
    one, two = (layer.to(dtype).float() for layer in (linear(32, 64), linear(32, 64, bias=False, seed=1)))
    expected = reference(x.float(), one.weight, one.bias, mode="w4a16")
    expected = (expected + reference(x.float(), two.weight, mode="w4a16")) * parameter(32).to(dtype)
    found = run(graph_module, x)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)
    assert_unchanged(UseFloatActivations(), graph_module)


def test_activations_in_float_stay_rotated():
    graph_module = quantized(lambda m, x: m.a(x), a=linear(32, 64), rotated=("a",))
    assert UseFloatActivations()(graph_module).modified
    (rotation,) = nodes(graph_module, lobcq.rotate.default)
    (product,) = nodes(graph_module, lobcq.linear.float_activation)
    assert product.args[0] is rotation


def test_float_layers_and_float_activations_stay():
    assert_unchanged(UseFloatActivations(), two_layers("w4a16"))
    assert_unchanged(UseFloatActivations(), graph_of(linear(32, 64)))


def test_weights_of_eight_bits():
    graph_module = two_layers("w4a16")
    packed = two_layers("w4a16")
    assert LowerToMatMulNBits(packed)(graph_module).modified
    assert targets(graph_module).count(matmul_nbits) == 2
    assert EliminateDeadCode()(graph_module).modified
    parts = {
        f"{layer}.weight.{part}" for layer in ("one", "two") for part in ("blocks", "block_scales", "tensor_scale")
    }
    assert names(graph_module) == parts | {"one.bias", "factor"}
    for layer in (graph_module.one, graph_module.two):
        weight = (layer.weight.blocks.float() - 128) * layer.weight.block_scales[..., None] * layer.weight.tensor_scale
        original = linear(32, 64) if layer is graph_module.one else linear(32, 64, bias=False, seed=1)
        assert torch.equal(weight.flatten(1), decoded(original.weight))
    assert_unchanged(LowerToMatMulNBits(packed), graph_module)


def test_encoded_activations_are_not_lowered():
    graph_module = two_layers()
    assert nodes(graph_module, lobcq.linear.default)
    assert_unchanged(LowerToMatMulNBits(graph_module), graph_module)
    assert aten.mul.Tensor in targets(graph_module)


@pytest.mark.parametrize(
    ("squeeze", "left"),
    [
        (lambda m, x: x.squeeze(1) + 1, []),
        (lambda m, x: x[:, None].squeeze((1, -2)) + 1, [[1]]),
        (lambda m, x: x[:, None].squeeze((0, 2)) + 1, []),
    ],
    ids=["of a length", "of a one and a length", "of lengths"],
)
def test_a_squeeze_of_what_is_not_one(squeeze, left):
    graph_module, x = graph_of(Function(squeeze)), values(2, 5, 64)
    assert SqueezeOnesOnly()(graph_module).modified
    squeezes = [node for node in graph_module.graph.nodes if "squeeze." in str(node.target) and "un" not in node.name]
    assert [node.args[1] for node in squeezes] == left
    assert torch.equal(run(graph_module, x), squeeze(None, x))
    assert_metadata(graph_module, x)
    assert_unchanged(SqueezeOnesOnly(), graph_module)


def test_squeezes_of_ones_and_of_whatever_is_one_stay():
    for squeeze in (
        lambda m, x: x[:, None].squeeze(1),
        lambda m, x: x[:, None, :, None].squeeze((1, 3)),
        lambda m, x: x[:, None].squeeze(),
    ):
        assert_unchanged(SqueezeOnesOnly(), graph_of(Function(squeeze)))
    graph_module = graph_of(Function(lambda m, x: x.squeeze(1)))
    for node in graph_module.graph.nodes:
        node.meta.pop("val", None)
    assert_unchanged(SqueezeOnesOnly(), graph_module)
