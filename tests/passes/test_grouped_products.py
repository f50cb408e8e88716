"""Grouped products with a stacked weight: which become `lobcq::grouped_linear`, what they read, and near misses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.config import LobcqConfig
from lobcq_fx.encoding import encode_weights
from lobcq_fx.float_weights import FloatWeights, WeightScales
from lobcq_fx.format import absmax_row_scale, encode, encode_int8, encode_stack, grouped_matmul, universal_codebooks
from lobcq_fx.graph.attributes import named_arguments, register_attribute
from lobcq_fx.graph.matmuls import find_matmuls
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from lobcq_fx.passes.emit import Emit
from lobcq_fx.passes.prepack import Prepack, restore_weights
from lobcq_fx.plan import QuantizationPlan
from tests.passes.graphs import (
    Function,
    assert_metadata,
    aten,
    lobcq,
    nodes,
    normalized,
    parameter,
    rewritten,
    run,
    targets,
    values,
)

EXPERTS, N, K, TOKENS = 4, 24, 72, 6
STACK, FLIPPED = parameter(EXPERTS, N, K), parameter(EXPERTS, K, N)
GROUPED = (lobcq.grouped_linear.default, lobcq.grouped_linear.int8_activation, lobcq.grouped_linear.float_activation)


class Experts(nn.Module):
    """Tokens to the expert that a router's scores sort them to, as transformers writes it."""

    def __init__(self, weight, flipped=False, gather=True):
        super().__init__()
        self.router, self.w, self.flipped, self.gather = parameter(EXPERTS, K, seed=3), weight, flipped, gather

    def forward(self, x):
        experts, order = (x @ self.router.t()).topk(2).indices.flatten().sort()
        ends = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        rows = x[order // 2] if self.gather else x[(order // 2).clamp(min=0)]
        w = self.w if self.flipped else self.w.transpose(-2, -1)
        return torch._grouped_mm(rows, w, offs=ends)


def graph_of(model, dtype=torch.bfloat16):
    return normalized(model.to(dtype), values(TOKENS, K).to(dtype))


def emitted(model, config=None, dtype=torch.bfloat16):
    graph_module = graph_of(model, dtype)
    result, records = rewritten(graph_module, config or LobcqConfig(exclude=["router"]))
    EliminateDeadCode()(graph_module)
    return graph_module, result, records


def expected_of(model, weight, x, mode="w4a4"):
    """By the format, row by row of the dispatched tokens."""
    experts, order = (x @ model.router.t()).topk(2).indices.flatten().sort()
    rows, ends = x[order // 2].float(), experts.bincount(minlength=EXPERTS).cumsum(0).tolist()
    codebooks, spec = universal_codebooks(8), LobcqConfig().format
    stack = encode_stack(weight.detach(), spec, codebooks, search_scales=True)
    if mode == "w4a8":
        return grouped_matmul(encode_int8(rows, 64), stack, ends)
    return grouped_matmul(encode(rows, spec, codebooks, absmax_row_scale(rows)), stack, ends)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("mode", ["w4a4", "w4a8"])
def test_tokens_are_encoded_before_they_are_dispatched(flipped, mode):
    model = Experts(nn.Parameter((FLIPPED if flipped else STACK).detach().clone()), flipped)
    config = LobcqConfig(exclude=["router"], mode=mode)
    graph_module, result, records = emitted(model, config)
    assert result.modified
    (node,) = [one for one in graph_module.graph.nodes if one.target in GROUPED]
    weight = model.w.detach().float()
    weight = weight.transpose(1, 2) if flipped else weight
    record = next(record for record in records if record.shape == (EXPERTS, N, K))
    assert (record.layer, record.reason, record.operation) == ("w", None, "_grouped_mm")
    assert record.multiply_adds == 2 * TOKENS * N * K
    assert "aten.index.Tensor" not in map(str, targets(graph_module))  # the op gathers what is encoded
    assert named_arguments(node)["rows"].target is aten.floor_divide.default
    assert {tuple(one.shape) for name, one in graph_module.state_dict().items() if name.startswith("w.")} == {
        (EXPERTS, N, 64), (EXPERTS, N, 6), (EXPERTS, N, 2), (EXPERTS,)
    }  # fmt: skip
    for tokens in (TOKENS, 1, 11):
        x = values(tokens, K, seed=tokens).bfloat16()
        out = run(graph_module, x)
        assert_metadata(graph_module, x)
        torch.testing.assert_close(out.float(), expected_of(model, weight, x, mode), rtol=2e-2, atol=2e-2)
    plan = QuantizationPlan.of(graph_of(model), config)
    assert plan.quantized
    assert not Emit(plan, CodebookSets.universal({config.format}))(graph_module).modified


@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
def test_tokens_are_scaled_and_rotated_before_they_are_dispatched(mode):
    """With the weight's columns to match the product stays what it was; every row of it is rotated once."""
    weight = parameter(EXPERTS, N, 128).detach()
    scale = torch.exp2(torch.arange(128) % 3 - 1.0).bfloat16()
    model = Experts(nn.Parameter(weight.clone()))
    model.router = parameter(EXPERTS, 128, seed=3)
    config = LobcqConfig(exclude=["router"], mode=mode, smoothing="everywhere", rotation="hadamard")
    graph_module = normalized(model.bfloat16(), values(TOKENS, 128).bfloat16())
    plan = QuantizationPlan.of(graph_module, config)
    (planned,) = plan.quantized
    codebooks = CodebookSets.universal({config.format})
    register_attribute(graph_module, planned.input_scale, scale)
    weights = FloatWeights(graph_module, {planned.weight: WeightScales(columns=1 / scale.float(), rotation=64)})
    encode_weights(plan, weights, codebooks)
    Emit(plan, codebooks, {planned})(graph_module)
    EliminateDeadCode()(graph_module)
    (rotation,) = nodes(graph_module, lobcq.rotate.default)
    assert rotation.args[0].target is aten.mul.Tensor
    assert aten.index.Tensor not in targets(graph_module)
    x = values(11, 128, seed=11).bfloat16()
    stored, exact = run(graph_module, x), model(x)
    assert (stored - exact).float().norm() < 0.2 * exact.float().norm()
    layout = weight_layout(torch.device("cpu"))
    if layout is None:
        return
    Prepack(layout)(graph_module)
    assert (not nodes(graph_module, lobcq.rotate.default)) == (mode != "w4a16")  # else the kernel does it
    torch.testing.assert_close(run(graph_module, x).float(), stored.float(), rtol=1e-2, atol=1e-2)


def test_rows_that_may_count_from_the_end_are_gathered_first():
    graph_module, *_ = emitted(Experts(nn.Parameter(STACK.detach().clone()), gather=False))
    (node,) = nodes(graph_module, lobcq.grouped_linear.default)
    assert named_arguments(node)["rows"] is None
    assert aten.index.Tensor in targets(graph_module)


def test_tokens_that_are_written_to_before_the_product_are_gathered_first():
    class Writes(Experts):
        def forward(self, x):
            x = x * 2
            experts, order = (x @ self.router.t()).topk(2).indices.flatten().sort()
            ends = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
            rows = x[order // 2]
            x.zero_()
            return torch._grouped_mm(rows, self.w.transpose(-2, -1), offs=ends) + x.sum()

    graph_module, *_ = emitted(Writes(nn.Parameter(STACK.detach().clone())))
    assert aten.index.Tensor in targets(graph_module)
    assert run(graph_module, values(TOKENS, K).bfloat16()).float().abs().sum() > 0


def test_groups_of_one_size():
    model = Function(lambda m, x: torch.bmm(x, m.w), w=nn.Parameter(FLIPPED.detach().clone()))
    x = values(EXPERTS, 3, K)
    graph_module = normalized(model, x)
    (matmul,) = find_matmuls(graph_module)
    assert (matmul.grouped, matmul.offsets, matmul.shape, matmul.flipped) == (True, None, (EXPERTS, N, K), True)
    rewritten(graph_module)
    codebooks, spec = universal_codebooks(8), LobcqConfig().format
    stack = encode_stack(model.w.detach().transpose(1, 2), spec, codebooks, search_scales=True)
    rows = x.flatten(0, 1)
    a = encode(rows, spec, codebooks, absmax_row_scale(rows))
    torch.testing.assert_close(run(graph_module, x).flatten(0, 1), grouped_matmul(a, stack, [3, 6, 9, 12]))


PRODUCT = "activation x activation, no constant weight"
OTHER = "its constant operand is not a 2-D weight on the right"
FORM = "a grouped product in another form than"
ENDS = torch.tensor([2, 3, 3, 6], dtype=torch.int32)
REFUSED = {
    "both activations": (lambda m, x: torch.bmm(x, x.transpose(1, 2)), {}, (4, 3, K), PRODUCT),
    "a stack on the left": (lambda m, x: torch.bmm(m.w, x), {"w": STACK}, (4, K, 3), OTHER),
    "a stack that is computed": (lambda m, x: torch.bmm(x, m.w * 2), {"w": FLIPPED}, (4, 3, K), OTHER),
    "no offsets": (
        lambda m, x: torch._grouped_mm(x.bfloat16(), m.w.bfloat16()), {"w": FLIPPED}, (4, 8, K), FORM
    ),
    "a dtype of its own": (
        lambda m, x: torch._grouped_mm(x, m.w, offs=m.ends, out_dtype=torch.bfloat16),
        {"w": nn.Parameter(FLIPPED.detach().bfloat16()), "ends": nn.Parameter(ENDS, requires_grad=False)}, (6, K), FORM,
    ),
    "a stack of two groupings": (
        lambda m, x: torch._grouped_mm(x.t(), m.w, offs=m.ends),
        {
            "w": nn.Parameter(parameter(6, N).detach().bfloat16()),
            "ends": nn.Parameter(ENDS, requires_grad=False),
        }, (6, K), FORM,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_near_misses_stay_in_float_with_their_reason(case):
    function, members, shape, reason = REFUSED[case]
    x = values(*shape)
    model = Function(function, **members)
    if "ends" in members:
        x = x.bfloat16()
    graph_module = normalized(model, x)
    result, records = rewritten(graph_module)
    assert not result.modified
    assert any(record.reason.startswith(reason) for record in records), [record.reason for record in records]


@pytest.mark.skipif(weight_layout(torch.device("cpu")) is None, reason="the CPU core was not built")
def test_prepack_lays_out_each_matrix_and_restores_the_bytes():
    graph_module, *_ = emitted(Experts(nn.Parameter(STACK.detach().clone())))
    x = values(TOKENS, K).bfloat16()
    before, state = run(graph_module, x), {k: v.clone() for k, v in graph_module.state_dict().items()}
    assert Prepack(weight_layout(torch.device("cpu")))(graph_module).modified
    assert len(nodes(graph_module, lobcq.grouped_linear_prepacked.default)) == 1
    assert not any(one.target in GROUPED for one in graph_module.graph.nodes)
    assert lobcq.quantize_activation.default not in targets(graph_module)
    assert graph_module.w.prepacked.dim() == 2
    assert graph_module.w.prepacked.shape[0] == EXPERTS
    torch.testing.assert_close(run(graph_module, x).float(), before.float(), rtol=1e-2, atol=1e-2)
    assert_metadata(graph_module, x)
    after = graph_module.state_dict()
    assert all(torch.equal(after[k].view(-1).view(torch.uint8), v.view(-1).view(torch.uint8)) for k, v in state.items())
    restore_weights(graph_module)
    assert graph_module.w.codes.shape == (EXPERTS, N, 64)


@pytest.mark.skipif(weight_layout(torch.device("cpu")) is None, reason="the CPU core was not built")
def test_a_device_without_kernels_for_stacks_keeps_them_as_stored():
    class NoStacks:
        stacks = False

        def __getattr__(self, name):
            return getattr(weight_layout(torch.device("cpu")), name)

    graph_module, *_ = emitted(Experts(nn.Parameter(STACK.detach().clone())))
    assert not Prepack(NoStacks())(graph_module).modified
    assert len(nodes(graph_module, lobcq.grouped_linear.default)) == 1


def test_activation_formats_of_shorter_arrays():
    config = LobcqConfig(exclude=["router"], format="8x64", activation_format="8x16")
    weight = parameter(EXPERTS, N, 128)
    model = Experts(nn.Parameter(weight.detach().clone()))
    model.router = parameter(EXPERTS, 128, seed=3)
    graph_module = normalized(model.bfloat16(), values(TOKENS, 128).bfloat16())
    rewritten(graph_module, config)
    x = values(TOKENS, 128).bfloat16()
    stored = run(graph_module, x)
    layout = weight_layout(torch.device("cpu"))
    if layout is not None:
        Prepack(layout)(graph_module)
        torch.testing.assert_close(run(graph_module, x).float(), stored.float(), rtol=1e-2, atol=1e-2)
