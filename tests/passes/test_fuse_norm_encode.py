"""Norms on the way into the encoder: by their rule, and not where the graph says something else."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from lobcq_fx.config import LobcqConfig
from lobcq_fx.graph.norms import SEVERAL_DIMENSIONS
from lobcq_fx.graph.prepacked_calls import NO_METADATA
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.ops.prologues import layer_norm, rms_norm
from lobcq_fx.passes.fuse_norm_encode import FuseNormEncode
from tests.families import VOCABULARY, own_causal_lm
from tests.passes.graphs import (
    assert_metadata,
    assert_unchanged,
    aten,
    linear,
    lobcq,
    nodes,
    parameter,
    prepacked_graph,
    run,
    targets,
    values,
)
from tests.passes.test_order import lowered

pytestmark = pytest.mark.skipif(weight_layout(torch.device("cpu")) is None, reason="the CPU core was not built")

EPS = 1e-5
WRITTEN = "something writes to the norm's input or parameters before the linear runs"
CALLS = [(2, 3, 64), (1, 1, 64), (5, 9, 64)]
DTYPES = [torch.float32, torch.bfloat16]


def normalized(x, eps=EPS):
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def llama(weight, x):
    return weight * normalized(x).to(x.dtype)


def gemma(weight, x):
    return (normalized(x) * (1.0 + weight.float())).type_as(x)


def olmo2(weight, x):
    """With the last dimension counted from the first."""
    wide = x.float()
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(x.dim() - 1, keepdim=True) + EPS))).to(x.dtype)


def unweighted(_, x):
    return normalized(x).to(x.dtype)


def operator_norm(weight, x):
    return nn.functional.rms_norm(x, (64,), weight, EPS)


def layer(weight, x):
    return nn.functional.layer_norm(x, (64,), weight, weight.detach(), EPS)


NORMS = {
    llama: (lobcq.linear_prepacked.rms_norm, lambda w, x: rms_norm(x, w, EPS)),
    gemma: (lobcq.linear_prepacked.rms_norm, lambda w, x: rms_norm(x, w, EPS, 1.0, False)),
    olmo2: (lobcq.linear_prepacked.rms_norm, lambda w, x: rms_norm(x, w, EPS, 0.0, False)),
    unweighted: (lobcq.linear_prepacked.rms_norm, lambda w, x: rms_norm(x, None, EPS)),
    operator_norm: (lobcq.linear_prepacked.rms_norm, lambda w, x: rms_norm(x, w, EPS, 0.0, False)),
    layer: (lobcq.linear_prepacked.layer_norm, lambda w, x: layer_norm(x, w, w, EPS)),
}


def members():
    return {"scale": parameter(64, seed=5), "q": linear(48, 64), "k": linear(17, 64, bias=False, seed=1)}


def fused(function, reasons=(), **options) -> fx.GraphModule:
    graph_module = prepacked_graph(function, **options)
    result = FuseNormEncode()(graph_module)
    assert result.modified
    assert [refusal.reason for refusal in result.refusals] == list(reasons)
    assert_unchanged(FuseNormEncode(), graph_module)
    return graph_module


def parts(graph_module, x):
    with torch.no_grad():
        return graph_module(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
def test_the_encoded_norm_is_that_of_its_rule(norm, dtype):
    target, rule = NORMS[norm]
    graph_module = fused(lambda m, x: (lambda y: (m.q(y), m.k(y)))(norm(m.scale, x)), dtype=dtype, **members())
    assert len(nodes(graph_module, target)) == 1
    left = {aten.rsqrt.default, aten.mean.dim, aten.layer_norm.default, aten.rms_norm.default, aten.mul.Tensor}
    assert not left & set(targets(graph_module))
    linears = prepacked_graph(lambda m, x: (m.q(x), m.k(x)), dtype=dtype, **members())
    scale = members()["scale"].to(dtype)
    for shape in CALLS:
        x = 3 * values(*shape).to(dtype)
        for actual, expected in zip(parts(graph_module, x), parts(linears, rule(scale, x)), strict=True):
            assert torch.equal(actual, expected)
        assert_metadata(graph_module, x)


@pytest.mark.parametrize("norm", [llama, layer])
def test_a_norm_that_is_rotated(norm):
    target, rule = NORMS[norm]
    options = {"dtype": torch.bfloat16, "rotated": ("q", "k"), **members()}
    graph_module = fused(lambda m, x: (lambda y: (m.q(y), m.k(y)))(norm(m.scale, x)), **options)
    assert [call.args[-1] for call in nodes(graph_module, target)] == [True]
    assert lobcq.rotate.default not in targets(graph_module)
    linears = prepacked_graph(lambda m, x: (m.q(x), m.k(x)), **options)
    x = values(5, 9, 64).bfloat16()
    expected = parts(linears, rule(members()["scale"].bfloat16(), x))
    for actual, wanted in zip(parts(graph_module, x), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
def test_it_is_the_graph_s_norm(norm):
    """Where bf16 hides the last bits of the mean, to the last encoded byte."""
    options = {"dtype": torch.bfloat16, **members()}
    before = prepacked_graph(lambda m, x: m.q(norm(m.scale, x)), **options)
    after = fused(lambda m, x: m.q(norm(m.scale, x)), **options)
    x = values(7, 5, 64).bfloat16()
    same = (run(before, x) == run(after, x)).all(-1)
    assert same.float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sum_that_is_normed_comes_out_too(dtype):
    def block(m, x):
        total = x + torch.relu(x)
        return m.q(llama(m.scale, total)), total * 2

    graph_module = fused(block, dtype=dtype, **members())
    (call,) = nodes(graph_module, lobcq.linear_prepacked.add_rms_norm)
    assert sorted(user.args[1] for user in call.users) == [0, 1]
    assert aten.add.Tensor not in targets(graph_module)
    linears = prepacked_graph(lambda m, x: m.q(x), dtype=dtype, **members())
    for shape in CALLS:
        x = values(*shape).to(dtype)
        out, doubled = parts(graph_module, x)
        total = x + torch.relu(x)
        assert torch.equal(doubled, total * 2)
        assert torch.equal(out, run(linears, rms_norm(total, members()["scale"].to(dtype), EPS)))
        assert_metadata(graph_module, x)


def read_early(m, x):
    total = x + torch.relu(x)
    early = torch.tanh(total)
    return m.q(llama(m.scale, total)) + m.up(early)


@pytest.mark.parametrize(
    "block",
    [
        read_early,
        lambda m, x: m.q(llama(m.scale, torch.add(x, torch.relu(x), alpha=2))),
        lambda m, x: m.q(llama(m.scale, x + m.scale)),
    ],
    ids=["read before the linears", "a weighted sum", "a broadcast"],
)
def test_a_sum_that_the_call_cannot_make_stays(block):
    options = {"dtype": torch.bfloat16, "up": linear(48, 64, seed=3), **members()}
    before = prepacked_graph(block, **options)
    graph_module = fused(block, **options)
    assert aten.add.Tensor in targets(graph_module)
    assert len(nodes(graph_module, lobcq.linear_prepacked.rms_norm)) == 1
    x = values(2, 3, 64).bfloat16()
    assert (run(before, x) == run(graph_module, x)).all(-1).float().mean() > 0.5


def test_rows_that_a_view_merges():
    """GPT-2 multiplies [B * T, K]."""
    graph_module = fused(lambda m, x: m.q(layer(m.scale, x).view(-1, 64)).view(*x.shape[:-1], 48), **members())
    assert len(nodes(graph_module, lobcq.linear_prepacked.layer_norm)) == 1
    linears = prepacked_graph(lambda m, x: m.q(x), **members())
    x = values(2, 3, 64)
    scale = members()["scale"]
    assert torch.equal(run(graph_module, x), run(linears, layer_norm(x, scale, scale, EPS)))
    assert_metadata(graph_module, x)


def over_batch(m, x):
    wide = x.float()
    return m.scale * (wide * torch.rsqrt(wide.pow(2).mean((1, 2), keepdim=True) + EPS))


def with_computed_eps(m, x):
    return m.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.abs().amax(-1, keepdim=True)))


def narrowed_early(m, x):
    return (m.scale * normalized(x).to(torch.float16)).to(x.dtype)


def in_half(m, x):
    x = x.half()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)).float()


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (over_batch, SEVERAL_DIMENSIONS),
        (lambda m, x: nn.functional.layer_norm(x, (3, 64)), SEVERAL_DIMENSIONS),
        (lambda m, x: nn.functional.rms_norm(x, (3, 64)), SEVERAL_DIMENSIONS),
        (lambda m, x: nn.functional.rms_norm(x, (64,)), "its eps depends on the dtype"),
        (with_computed_eps, "its eps is computed"),
        (
            lambda m, x: m.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=torch.bfloat16) + EPS)),
            "its mean is not in fp32",
        ),
        (narrowed_early, "it rounds torch.float32 to torch.float16"),
        (in_half, "its mean is not in fp32"),
        (lambda m, x: normalized(x) * x, "its weight is not one float for each column"),
        (lambda m, x: normalized(x.half()), "it makes torch.float32 of torch.float16"),
    ],
    ids=str,
)
def test_near_misses_stay_and_say_why(norm, reason):
    graph_module = prepacked_graph(lambda m, x: m.q(norm(m, x)), **members())
    before = graph_module.code
    result = FuseNormEncode()(graph_module)
    assert not result.modified
    assert graph_module.code == before
    assert [(refusal.layer, refusal.reason) for refusal in result.refusals] == [("q", reason)]


def test_a_norm_that_something_else_reads_stays():
    graph_module = prepacked_graph(lambda m, x: (lambda y: (m.q(y), y * 2))(llama(m.scale, x)), **members())
    result = FuseNormEncode()(graph_module)
    assert not result.modified
    assert "reads the norm's result too" in result.refusals[0].reason


def test_what_is_no_norm_is_not_worth_a_word():
    graph_module = prepacked_graph(lambda m, x: m.q(torch.relu(x) * m.scale), **members())
    result = assert_unchanged(FuseNormEncode(), graph_module)
    assert not result.refusals


def test_a_graph_without_metadata_stays():
    graph_module = prepacked_graph(lambda m, x: m.q(llama(m.scale, x)), **members())
    for node in graph_module.graph.nodes:
        node.meta.clear()
    result = assert_unchanged(FuseNormEncode(), graph_module)
    assert [refusal.reason for refusal in result.refusals] == [NO_METADATA]


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.scale = linear(48, 64), parameter(64, seed=5)

    def forward(self, x):
        state = x + 1
        norm = llama(self.scale, state)
        state.mul_(2)
        return self.q(norm), state


def test_an_input_that_is_written_to_is_read_where_it_was():
    graph_module = prepacked_graph(lambda m, x: m.block(x), block=InPlace())
    assert aten.mul_.Tensor in targets(graph_module)
    result = FuseNormEncode()(graph_module)
    assert not result.modified
    assert result.refusals[0].reason == WRITTEN


def write_to_the_weight(m, x):
    weight = m.scale * 2
    norm = llama(weight, x)
    weight.mul_(3)
    return m.q(norm) + weight.sum()


def write_to_the_bias(m, x):
    bias = m.scale * 2
    norm = nn.functional.layer_norm(x, (64,), m.scale, bias, EPS)
    bias.mul_(3)
    return m.q(norm) + bias.sum()


def write_by_a_list(m, x):
    state = x + 1
    norm = llama(m.scale, state)
    torch._foreach_mul_([state], 2.0)
    return m.q(norm) + state.sum()


def write_to_out(m, x):
    state = x + 1
    norm = llama(m.scale, state)
    torch.add(x, x, out=state)
    return m.q(norm) + state.sum()


def write_through_an_undeclared_alias(m, x):
    state = x + 1
    norm = llama(m.scale, state)
    state.type_as(x).mul_(2)
    return m.q(norm) + state.sum()


@pytest.mark.parametrize(
    "block",
    [write_to_the_weight, write_to_the_bias, write_by_a_list, write_to_out, write_through_an_undeclared_alias],
    ids=lambda block: block.__name__,
)
def test_whatever_writes_to_an_operand_is_seen(block):
    graph_module = prepacked_graph(block, **members())
    result = FuseNormEncode()(graph_module)
    assert not result.modified
    assert result.refusals[0].reason == WRITTEN


def test_linears_in_two_formats_share_a_norm():
    """Each computes it for itself."""
    config = LobcqConfig(overrides={"k": {"format": "16x64"}})
    graph_module = fused(
        lambda m, x: (lambda y: (m.q(y), m.k(y)))(llama(m.scale, x)), config=config, dtype=torch.bfloat16, **members()
    )
    assert len(nodes(graph_module, lobcq.linear_prepacked.rms_norm)) == 2
    assert aten.rsqrt.default not in targets(graph_module)


@torch.no_grad()
def test_a_whole_model():
    q = own_causal_lm("llama", torch.bfloat16)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = q(ids).logits
    lowered(q)
    assert len(nodes(q.graph_module, aten.rsqrt.default)) == 1  # the last norm feeds the float head
    torch.testing.assert_close(q(ids).logits, expected, rtol=0.05, atol=0.05)
