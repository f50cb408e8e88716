"""prepack: weights in a kernel layout, linears that read them and encode for themselves, and the way back."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import Tensor, fx, nn

from lobcq_fx.config import LobcqConfig
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.modules.packed_weight import PARTS, PackedWeight
from lobcq_fx.passes.prepack import Prepack, restore_weights
from lobcq_fx.passes.share_activations import ShareActivations
from tests.passes.graphs import (
    Function,
    assert_metadata,
    assert_unchanged,
    linear,
    lobcq,
    nodes,
    normalized,
    parameter,
    quantized,
    reference,
    rewritten,
    run,
    values,
)  # fmt: skip

LAYOUT = weight_layout(torch.device("cpu"))
pytestmark = pytest.mark.skipif(LAYOUT is None, reason="the CPU core was not built, or is switched off")

LINEARS = {"w4a4": lobcq.linear.default, "w4a8": lobcq.linear.int8_activation, "w4a16": lobcq.linear.float_activation}
ENCODERS = (lobcq.quantize_activation.default, lobcq.quantize_activation_int8.default)
FORMAT_OPS = (*LINEARS.values(), *ENCODERS)
PREPACKED = {
    "w4a4": lobcq.linear_prepacked.default,
    "w4a8": lobcq.linear_prepacked.default,
    "w4a16": lobcq.linear_prepacked.float_activation,
}
CALLS = [values(2, 3, 64), values(1, 1, 64), values(5, 9, 64)]


def siblings(config=None, data=None, seed=0):
    members = {"q": linear(48, 64, seed=seed), "k": linear(17, 64, bias=False, seed=seed + 1)}
    return quantized(lambda m, x: (m.q(x), torch.relu(m.k(x))), config, data, **members), members


def prepacked(graph_module) -> fx.GraphModule:
    result = Prepack(LAYOUT)(graph_module)
    assert result.modified
    return result.graph_module


def raw(tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_state(graph_module, expected):
    state = graph_module.state_dict()
    assert set(state) == set(expected)
    for name, tensor in state.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert torch.equal(raw(tensor), raw(expected[name])), name


@pytest.mark.parametrize("scale", ["per_token", "static"])
@pytest.mark.parametrize("mode", LINEARS)
def test_linears_become_calls_with_the_same_results(mode, scale):
    if (mode, scale) == ("w4a16", "static"):
        pytest.skip("a contradiction that the configuration refuses")
    graph_module, _ = siblings(LobcqConfig(mode=mode, activation_scale=scale), values(2, 3, 64))
    assert len(nodes(graph_module, LINEARS[mode])) == 2
    before = [run(graph_module, x) for x in CALLS]

    prepacked(graph_module)
    calls = nodes(graph_module, PREPACKED[mode])
    assert len(calls) == 2
    assert all((call.args[1] is None) == (mode == "w4a8") for call in calls)
    assert not any(nodes(graph_module, op) for op in FORMAT_OPS)
    for x, expected in zip(CALLS, before, strict=True):
        for actual, wanted in zip(run(graph_module, x), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    for x in CALLS:
        assert_metadata(graph_module, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["1x16", "2x128", "4x32", "8x64", "16x64"])
def test_results_are_the_format_s(name, dtype):
    config = LobcqConfig(format=name)
    members = {"q": linear(48, 64), "k": linear(17, 64, bias=False, seed=1)}
    graph_module = normalized(Function(lambda m, x: (m.q(x), m.k(x)), **members).to(dtype), values(2, 3, 64).to(dtype))
    rewritten(graph_module, config)
    ShareActivations()(graph_module)
    prepacked(graph_module)
    x = values(4, 5, 64, seed=3).to(dtype)
    for actual, layer in zip(run(graph_module, x), members.values(), strict=True):
        bias = None if layer.bias is None else layer.bias.float()
        expected = reference(x.float(), layer.weight.float(), bias, config.format)
        rounding = torch.finfo(dtype).eps
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected, rtol=rounding + 1e-5, atol=1e-5)


def test_a_second_run_changes_nothing():
    graph_module, _ = siblings()
    assert_unchanged(Prepack(LAYOUT), prepacked(graph_module))


def test_bytes_are_held_once_and_state_dicts_keep_the_format_s_names():
    graph_module, _ = siblings()
    before = {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    prepacked(graph_module)
    held = {name for name, _ in graph_module.named_buffers()}
    assert {"q.weight.prepacked", "k.weight.prepacked"} < held
    assert not {f"{layer}.weight.codes" for layer in "qk"} & held
    assert_same_state(graph_module, before)


def test_a_state_dict_loads_into_the_kernel_layout():
    source, target = siblings(seed=5)[0], prepacked(siblings()[0])
    other = prepacked(copy.deepcopy(source))
    missing, unexpected = target.load_state_dict(source.state_dict())
    assert not missing
    assert not unexpected
    for actual, expected in zip(run(target, CALLS[0]), run(other, CALLS[0]), strict=True):
        assert torch.equal(actual, expected)


def test_restored_weights_are_the_stored_ones():
    graph_module, _ = siblings()
    stored = copy.deepcopy(graph_module.graph)
    before, state = run(graph_module, CALLS[0]), {k: v.clone() for k, v in graph_module.state_dict().items()}
    prepacked(graph_module)
    restore_weights(graph_module)
    graph_module.graph = stored
    assert {name for name, _ in graph_module.named_buffers()} == {
        *(f"{layer}.weight.{part}" for layer in "qk" for part in PARTS),
        "lobcq.codebooks",
    }
    assert_same_state(graph_module, state)
    for actual, expected in zip(run(graph_module, CALLS[0]), before, strict=True):
        assert torch.equal(actual, expected)


def test_a_tied_weight_is_packed_once_and_read_by_both():
    first, second = linear(64, 64, bias=False), linear(64, 64, bias=False)
    second.weight = first.weight
    graph_module = quantized(lambda m, x: m.b(torch.relu(m.a(x))), a=first, b=second)
    before = run(graph_module, CALLS[0])
    prepacked(graph_module)
    assert len(nodes(graph_module, PREPACKED["w4a4"])) == 2
    assert sum(isinstance(module, PackedWeight) for module in graph_module.modules()) == 1
    torch.testing.assert_close(run(graph_module, CALLS[0]), before, rtol=1e-5, atol=1e-5)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(32, 64, bias=False), linear(32, 64, bias=False, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        first = self.a(y)
        y.mul_(-3)
        return first + self.b(y)


@pytest.mark.parametrize("mode", LINEARS)
def test_an_activation_is_read_before_it_is_written_to(mode):
    graph_module = normalized(InPlace())
    rewritten(graph_module, LobcqConfig(mode=mode))
    ShareActivations()(graph_module)
    before = run(graph_module, CALLS[0])
    prepacked(graph_module)
    assert len(nodes(graph_module, PREPACKED[mode])) == 2
    torch.testing.assert_close(run(graph_module, CALLS[0]), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["w4a4", "w4a8"])
def test_a_call_rotates_its_activation_itself(mode, dtype):
    members = {"q": linear(48, 64), "k": linear(17, 64, bias=False, seed=1)}
    options = {"config": LobcqConfig(mode=mode), "dtype": dtype, "rotated": ("q", "k"), **members}
    graph_module = quantized(lambda m, x: (m.q(x), m.k(x)), **options)
    assert len(nodes(graph_module, lobcq.rotate.default)) == 1
    before = [run(graph_module, x.to(dtype)) for x in CALLS]
    prepacked(graph_module)
    assert not nodes(graph_module, lobcq.rotate.default)
    assert [call.args[-1] for call in nodes(graph_module, PREPACKED[mode])] == [True, True]
    rounding = torch.finfo(dtype).eps
    for x, expected in zip(CALLS, before, strict=True):
        for actual, wanted in zip(run(graph_module, x.to(dtype)), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=rounding + 1e-5, atol=1e-5)
        assert_metadata(graph_module, x.to(dtype))


def with_a_write(graph_module):
    """Something writes to the activation between its rotation and its encoder."""
    (encoder,) = nodes(graph_module, lobcq.quantize_activation.default)
    (write,) = nodes(graph_module, torch.ops.aten.mul_.Tensor)
    encoder.prepend(write)


def of_other_arrays(graph_module):
    (rotation,) = nodes(graph_module, lobcq.rotate.default)
    rotation.args = (rotation.args[0], 32)


@pytest.mark.parametrize("change", [with_a_write, of_other_arrays])
def test_rotations_that_a_call_cannot_take_over_stay(change):
    def block(m, x):
        y = x.clone()
        out = m.a(y)
        y.mul_(-3)
        return out

    graph_module = quantized(block, a=linear(32, 64), rotated=("a",))
    change(graph_module)
    graph_module.recompile()
    before = run(graph_module, CALLS[0])
    prepacked(graph_module)
    assert len(nodes(graph_module, lobcq.rotate.default)) == 1
    (call,) = nodes(graph_module, PREPACKED["w4a4"])
    assert call.args[-1] is False
    torch.testing.assert_close(run(graph_module, CALLS[0]), before, rtol=1e-5, atol=1e-5)


def test_a_float_activation_is_rotated_by_itself_and_keeps_its_dtype():
    options = {"config": LobcqConfig(mode="w4a16"), "dtype": torch.bfloat16, "rotated": ("a",)}
    graph_module = quantized(lambda m, x: m.a(x), a=linear(32, 64), **options)
    before = run(graph_module, CALLS[0].bfloat16())
    prepacked(graph_module)
    assert len(nodes(graph_module, lobcq.rotate.default)) == 1
    after = run(graph_module, CALLS[0].bfloat16())
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after, before)


def test_a_computed_bias_keeps_its_linear_and_all_that_read_its_weight():
    a, b, c = linear(64, 64, bias=False), linear(64, 64, bias=False), linear(64, 64, bias=False, seed=2)
    b.weight = a.weight
    graph_module = quantized(
        lambda m, x: nn.functional.linear(x, m.a.weight, m.s * 2) + m.b(x) + m.c(x), a=a, b=b, c=c, s=parameter(64)
    )
    before = run(graph_module, CALLS[0])
    assert len(nodes(graph_module, LINEARS["w4a4"])) == 3
    prepacked(graph_module)
    assert len(nodes(graph_module, LINEARS["w4a4"])) == 2
    (call,) = nodes(graph_module, PREPACKED["w4a4"])
    assert [node.target for node in call.args[3]] == ["c.weight.prepacked"]
    torch.testing.assert_close(run(graph_module, CALLS[0]), before, rtol=1e-5, atol=1e-5)


def test_parts_that_no_encoder_node_made_are_left_alone():
    graph_module = quantized(lambda m, x: m.a(x), a=linear(32, 64))
    (node,) = nodes(graph_module, LINEARS["w4a4"])
    (encoder,) = nodes(graph_module, ENCODERS[0])
    with graph_module.graph.inserting_after(encoder):
        swapped = graph_module.graph.call_function(operator.getitem, (encoder, 1))
    node.args = (node.args[0], swapped, *node.args[2:])
    node.args[1].args = (encoder, 0)  # selectors that are codes: nothing this package writes
    graph_module.recompile()
    assert_unchanged(Prepack(LAYOUT), graph_module)
