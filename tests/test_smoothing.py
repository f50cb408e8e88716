"""Smoothing: scales that even out columns, what takes them over, and that a float model is the same with them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers the grouped product)
from torch import Tensor, fx, nn

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.errors import CalibrationError
from lobcq_fx.float_weights import FloatWeights
from lobcq_fx.frontends import front_end_of
from lobcq_fx.graph.attributes import get_attribute, has_attribute
from lobcq_fx.passes.insert_observers import InsertObservers, observed
from lobcq_fx.pipeline import make_plan
from lobcq_fx.plan import PlannedMatmul, QuantizationPlan
from lobcq_fx.smoothing import Smoothed, balanced_scale, smooth, smoothing_groups
from lobcq_fx.tracing.trace import MAIN, trace_module
from tests.families import causal_lm

K = 64


class PreNorm(nn.Module):
    """Norms before linears, and a gate: all of it can be folded."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm, **changes: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm(K, eps=1e-6)
        self.gate, self.up, self.down = nn.Linear(K, 128), nn.Linear(K, 128), nn.Linear(128, K, bias=False)
        for name, module in changes.items():
            setattr(self, name, module)
        with torch.no_grad():  # a few columns stand out, in the norm and behind the gate
            self.norm.weight[::9] *= 30
            self.up.weight[3::17] *= 20

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class PostNorm(PreNorm):
    """The norm's result goes on to a sum too, and GELU lets no scale through: nothing can be folded."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.down(nn.functional.gelu(self.up(h)))


class Parts(PreNorm):
    """One linear makes the gate and what it gates."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__(both=nn.Linear(K, 256, bias=bias))
        del self.gate, self.up

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(self.norm(x)).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


class Routed(PreNorm):
    """A linear that stays in float reads the norm too, in rows of another shape."""

    def __init__(self) -> None:
        super().__init__(router=nn.Linear(K, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores = self.router(h.view(-1, K)).softmax(-1).amax(-1)
        return self.down(nn.functional.silu(self.gate(h)) * self.up(h)) * scores.view(*x.shape[:-1], 1)


class OneForAll(PreNorm):
    """What gates is one number for each row: no scale for each column can be taken off it."""

    def __init__(self) -> None:
        super().__init__(up=nn.Linear(K, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class RoutedByOthers(Routed):
    """Something else reads that linear's weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.router.weight.mean()


class Relu(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def data(seed: int = 1, rows: int = 40) -> Tensor:
    x = torch.randn(2, rows, K, generator=torch.Generator().manual_seed(seed))
    x[..., 5] *= 12
    return x


def smoothed_graph(
    model: nn.Module, x: Tensor | tuple[Tensor, ...], smoothing: str
) -> tuple[fx.GraphModule, QuantizationPlan, Smoothed, list[PlannedMatmul]]:
    inputs = x if isinstance(x, tuple) else (x,)
    graph_module = trace_module(model, inputs).graph_module
    plan, _ = make_plan({MAIN: graph_module}, LobcqConfig(smoothing=smoothing))
    groups = smoothing_groups(plan, {MAIN: graph_module})
    InsertObservers(plan)(graph_module)
    graph_module(*inputs)
    result = smooth(plan, graph_module, groups, observed(graph_module, plan))
    return graph_module, plan, result, list(plan.quantized)


@torch.no_grad()
@pytest.mark.parametrize(
    "model", [PreNorm(), PreNorm(nn.LayerNorm), Relu(), Parts(), Routed()],
    ids=["rms", "layer norm", "relu", "one linear in parts", "a linear in float"],
)  # fmt: skip
def test_the_folded_float_model_is_the_same_to_the_last_bit(model: nn.Module) -> None:
    x, before = data(), deepcopy(model.state_dict())
    expected = model(x)
    graph_module, plan, result, quantized = smoothed_graph(model, x, "folded")
    assert set(result.scales) == set(plan.weights)
    assert all(scales.columns is not None for scales in result.scales.values())
    weights = FloatWeights(graph_module, result.scales)
    scaled = {one.weight.source: weights(one.weight) for one in quantized if one.weight is not None}
    for name, weight in scaled.items():
        assert not torch.equal(get_attribute(graph_module, name), weight)
        get_attribute(graph_module, name).copy_(weight)  # in the model too, whose memory it is
    assert torch.equal(graph_module(x)[0], expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, scaled.get(name, before[name]))
    assert not any(one.input_scale for one in quantized)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "left"),
    [
        (Parts(bias=True), {"down"}),
        (OneForAll(), {"down"}),
        (RoutedByOthers(), {"gate", "up"}),
        (Routed().half(), {"gate", "up"}),
    ],
    ids=["a bias in parts", "one number for a row", "a weight that others read", "no room in fp16"],
)
def test_near_misses_are_not_folded(model: nn.Module, left: set[str]) -> None:
    x = data().to(next(model.parameters()).dtype)
    _, _, result, quantized = smoothed_graph(model, x, "folded")
    assert {one.layer for one in quantized} - {one.layer for one in result.matmuls} == left


class Stacks(nn.Module):
    """Experts that are given the groups of their rows, those of the second stack apart."""

    def __init__(self, move: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.move = nn.RMSNorm(K, eps=1e-6), move
        self.up, self.down = nn.Parameter(torch.randn(3, 128, K)), nn.Parameter(torch.randn(3, K, 64))

    def forward(self, x: Tensor, ends: Tensor, other: Tensor | None = None) -> Tensor:
        product = torch.ops.transformers.grouped_mm_fallback
        gate, up = product(self.norm(x), self.up.mT, ends).chunk(2, dim=-1)
        h = nn.functional.silu(gate) * up
        h = h if self.move is None else self.move(h)
        out: Tensor = product(h, self.down.mT, ends if other is None else other)
        return out


ENDS = torch.tensor([20, 21, 40], dtype=torch.int32)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "groups", "folded"),
    [
        (Stacks(), (ENDS,), True),
        (Stacks(), (ENDS, ENDS.flip(0).cumsum(0, dtype=torch.int32)), False),
        (Stacks(lambda h: h[torch.arange(40).flip(0)]), (ENDS,), False),
        (Stacks(lambda h: h.reshape(2, 20, 64).reshape(40, 64)), (ENDS,), False),
    ],
    ids=["the same groups", "other groups", "rows in another order", "rows in another shape"],
)
def test_experts_divide_the_rows_of_their_own_groups_alone(
    model: Stacks, groups: tuple[Tensor, ...], folded: bool
) -> None:
    _, _, result, quantized = smoothed_graph(model, (data()[0], *groups), "folded")
    found = {one.layer: result.scales.get(one.weight) for one in quantized if one.weight is not None}
    assert found["up"] is not None
    assert (found["down"] is not None) == folded
    if folded:
        assert found["down"] is not None
        assert found["down"].columns is not None
        assert found["up"].rows is not None
        assert torch.equal(found["up"].rows[:, 64:], 1 / found["down"].columns)
        assert torch.equal(found["up"].rows[:, :64], torch.ones(3, 64))


@torch.no_grad()
@pytest.mark.parametrize("smoothing", ["folded", "everywhere"])
def test_what_cannot_be_folded_is_multiplied_or_left_alone(smoothing: str) -> None:
    graph_module, _, result, quantized = smoothed_graph(PostNorm(), data(), smoothing)
    multiplied = [one for one in quantized if one.input_scale and has_attribute(graph_module, one.input_scale)]
    assert len(multiplied) == (2 if smoothing == "everywhere" else 0)
    assert len(result.scales) == len(multiplied)
    q = lobcq_fx.quantize(PostNorm(), [data()], LobcqConfig(smoothing=smoothing))
    scales = [node for node in q.stored_graph.nodes if node.op == "get_attr" and "input_scale" in str(node.target)]
    assert len(scales) == len(multiplied)
    kinds = {record.smoothing for record in q.inventory.quantized}
    assert kinds == ({"multiplied"} if smoothing == "everywhere" else {None})


@torch.no_grad()
@pytest.mark.parametrize(("model", "smoothing"), [(PreNorm(), "folded"), (PostNorm(), "everywhere")])
@pytest.mark.parametrize("mode", ["w4a4", "w4a16"])
def test_outputs_come_closer_and_survive_a_round_trip(
    model: nn.Module, smoothing: str, mode: str, tmp_path: Path
) -> None:
    x, before = data(9), deepcopy(model.state_dict())
    errors = {}
    for setting in ("none", smoothing):
        q = lobcq_fx.quantize(model, [data()], LobcqConfig(smoothing=setting, mode=mode))
        errors[setting] = (q(x) - model(x)).square().mean()
    assert errors[smoothing] < errors["none"] / 1.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    q.save_pretrained(tmp_path / "q")
    assert torch.equal(lobcq_fx.load(tmp_path / "q")(x), q(x))


@torch.no_grad()
def test_it_combines_with_static_scales_compensation_and_fitted_codebooks() -> None:
    x, model = data(9), PreNorm()
    plain = (lobcq_fx.quantize(model, [data()], LobcqConfig())(x) - model(x)).square().mean()
    config = LobcqConfig(smoothing="folded", rounding="compensated", activation_scale="static", codebooks="fitted")
    q = lobcq_fx.quantize(model, [data(rows=200)], config)
    assert (q(x) - model(x)).square().mean() < plain / 2
    assert {record.smoothing for record in q.inventory.quantized} == {"folded"}
    (name,) = {
        str(node.target) for node in q.stored_graph.nodes if str(node.target).startswith("gate.activation_scale")
    }
    scale = get_attribute(q.graphs[MAIN].graph_module, name)
    h = model.norm(data(rows=200)).abs().flatten(0, -2).amax(0)
    assert scale < h.max() / 13888 / 2  # of the activation that is encoded, not of the one that was observed


@torch.no_grad()
@pytest.mark.usefixtures("traced_once")
def test_a_language_model_folds_in_every_graph_of_it() -> None:
    model = causal_lm("llama", num_hidden_layers=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[::7] *= 40
    ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(2))
    batch = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    q, plain = (lobcq_fx.quantize(model, batch, LobcqConfig(smoothing=setting)) for setting in ("folded", "none"))
    assert set(q.graphs) == set(plain.graphs)
    expected = model(ids).logits
    error, without = ((one(input_ids=ids).logits - expected).square().mean() for one in (q, plain))
    assert error < 0.9 * without
    grown = q.generate(ids[:1], max_new_tokens=8, do_sample=False)
    static = q.generate(ids[:1], max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert torch.equal(grown, static)


def test_folding_sees_all_layers_of_a_llama() -> None:
    model = causal_lm("llama")
    traced = front_end_of(model).trace(model, None, static_cache=False)
    plan, _ = make_plan(traced.graph_modules, LobcqConfig(smoothing="folded"))
    main = traced.graphs[MAIN].graph_module
    groups = smoothing_groups(plan, traced.graph_modules)
    InsertObservers(plan)(main)
    ids = torch.arange(12).view(1, 12) + 3
    main(*traced.graphs[MAIN].calling.flatten((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    result = smooth(plan, main, groups, observed(main, plan))
    smoothed = {weight.source.split(".")[-2] for weight, scales in result.scales.items() if scales.columns is not None}
    assert smoothed == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}  # o_proj's is attention's


class Tied(PreNorm):
    """One weight behind two norms, whose columns differ."""

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(x)) + self.up(x)


def test_a_weight_that_two_activations_meet_is_left_alone() -> None:
    _, _, result, quantized = smoothed_graph(Tied(), data(), "everywhere")
    assert len(quantized) == 2
    assert not result.scales


class Written(PreNorm):
    """One activation node is two activations."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        rows = h.view(-1, K)
        first = self.gate(rows)
        h.mul_(-3)
        return first + self.up(rows)


@torch.no_grad()
def test_what_is_written_to_between_two_readers_is_multiplied_for_each() -> None:
    x, model = data(9), Written()
    expected = model(x)
    q = lobcq_fx.quantize(model, [data()], LobcqConfig(smoothing="everywhere"))
    assert {record.smoothing for record in q.inventory.quantized} == {"multiplied"}
    assert (q(x) - expected).norm() < 0.1 * expected.norm()


def test_the_scale_balances_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(500, K, generator=generator) * torch.exp2(torch.randn(K, generator=generator) * 3) for _ in "xw"
    )
    scale = balanced_scale(x.square().mean(0), [w[:200], w[200:]])
    assert torch.equal(scale, torch.exp2(scale.log2().round()))
    xs, ws = (x / scale).square().mean(0), (w * scale).square().mean(0)
    assert (xs / ws / (xs / ws).log().mean().exp()).min() > 0.2
    least = (x.square().mean(0).sqrt() * w.square().mean(0).sqrt()).sum() ** 2
    assert xs.sum() * ws.sum() < 1.5 * least  # Cauchy-Schwarz: no scale gets below 1


def test_columns_without_a_value_keep_theirs() -> None:
    mean_squares, weight = torch.ones(K), torch.ones(8, K)
    mean_squares[3], weight[:, 4] = 0, 0
    assert torch.equal(balanced_scale(mean_squares, [weight]), torch.ones(K))
    assert torch.equal(balanced_scale(torch.zeros(K), [weight]), torch.ones(K))


def test_it_needs_data() -> None:
    with pytest.raises(CalibrationError, match=r"smoothing, rotation, compensated rounding .* need calibration_data"):
        lobcq_fx.quantize(PreNorm(), config=LobcqConfig(smoothing="folded"), example_inputs=data())
