"""QuantizedModel as a module: devices, casts, modes, state dicts, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.errors import CallError, LobcqError
from lobcq_fx.modules.packed_weight import PARTS
from tests.families import VOCABULARY, own_causal_lm, quantized_causal_lm
from tests.passes.graphs import values


class Model(nn.Module):
    """Creates a tensor on a device, has a buffer and a layer that stays in float."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down, self.norm = nn.Linear(64, 172), nn.Linear(172, 32, bias=False), nn.LayerNorm(32)
        self.register_buffer("offset", torch.randn(32))

    def forward(self, x):
        positions = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
        return self.norm(self.down(torch.relu(self.up(x))) + self.offset) + positions


X = values(2, 5, 64)


def quantized(seed=0, dtype=torch.float32, **settings):
    model = Model(seed).to(dtype).eval()
    return lobcq_fx.quantize(model, [X.to(dtype)], LobcqConfig(**settings))


@pytest.fixture(scope="module")
def q():
    return quantized()


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.own = nn.Linear(32, 4)

    def forward(self, x):
        return self.own(self.inner(x))


def devices(module):
    return {tensor.device.type for tensor in module.state_dict().values()}


MOVES = {
    "to": lambda q: q.to("meta"),
    "to a device object": lambda q: q.to(torch.device("meta")),
    "to a tensor's": lambda q: q.to(torch.empty(0, device="meta")),
    "to by keyword": lambda q: q.to(device="meta", dtype=torch.float32),
    "through a parent": lambda q: Outer(q).to("meta").inner,
    "to_empty": lambda q: q.to_empty(device="meta"),
}


@pytest.mark.parametrize("move", MOVES)
def test_to_moves_weights_and_what_the_graph_creates(move):
    moved = MOVES[move](quantized())
    assert devices(moved) == {"meta"}
    assert moved.device == torch.device("meta")
    out = moved(X.to("meta"))
    assert (out.device.type, out.shape) == ("meta", (2, 5, 32))
    assert "device(type='cpu')" not in moved.graph_module.code


def test_to_returns_the_model_and_changes_nothing_where_it_is(q):
    expected = q(X)
    assert q.to("cpu") is q
    assert q.cpu() is q
    assert q.float() is q
    assert q.to(torch.float32) is q
    assert torch.equal(q(X), expected)


CASTS = {
    "half": lambda q: q.half(),
    "bfloat16": lambda q: q.bfloat16(),
    "double": lambda q: q.double(),
    "to": lambda q: q.to(torch.float16),
    "to with a device": lambda q: q.to("cpu", torch.bfloat16),
    "parent.half": lambda q: Outer(q).half(),
    "parent.to": lambda q: Outer(q).to(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_are_refused_before_anything_changes(q, cast):
    expected = q(X)
    with pytest.raises(LobcqError, match=r"cannot be cast to torch\.\w+: cast the float model, then quantize it"):
        CASTS[cast](q)
    assert torch.equal(q(X), expected)
    assert q.dtype == torch.float32


def test_scales_of_a_half_precision_model_stay_in_fp32():
    q = quantized(dtype=torch.bfloat16, activation_scale="static")
    assert q.dtype == torch.bfloat16
    expected = q(X.bfloat16())
    before = {name: tensor.clone() for name, tensor in q.state_dict().items()}
    outer = Outer(q).to(torch.bfloat16)
    assert outer.own.weight.dtype == torch.bfloat16
    assert q.state_dict()["up.activation_scale"].dtype == torch.float32
    for name, tensor in q.state_dict().items():
        assert tensor.dtype == before[name].dtype
    assert torch.equal(q(X.bfloat16()), expected)
    q.bfloat16()
    with pytest.raises(LobcqError, match=r"cannot be cast to torch\.float32"):
        q.float()


def test_modes(q):
    assert not q.training
    assert not any(module.training for module in q.modules())
    assert q.eval() is q
    assert q.train(False) is q
    with pytest.raises(LobcqError, match="inference only: fine-tune the float model"):
        q.train()


def test_gradients_are_refused(q):
    assert not any(parameter.requires_grad for parameter in q.parameters())
    with pytest.raises(LobcqError, match="inference only and have no gradient"):
        q(X.clone().requires_grad_()).sum().backward()


NAMES = {
    *(f"{layer}.weight.{part}" for layer in ("up", "down") for part in PARTS),
    *("up.bias", "norm.weight", "norm.bias", "offset", "lobcq.codebooks"),
}


def test_state_dict_has_the_float_model_s_names(q):
    assert set(q.state_dict()) == NAMES
    assert set(q.state_dict(prefix="a.")) == {f"a.{name}" for name in NAMES}


def test_load_state_dict_round_trip(q):
    other = quantized(seed=1)
    assert not torch.equal(other(X), q(X))
    result = other.load_state_dict(q.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(other(X), q(X))


def test_state_dict_round_trip_as_a_submodule(q):
    outer = Outer(quantized())
    names = {f"inner.{name}" for name in NAMES} | {"own.weight", "own.bias"}
    assert set(outer.state_dict()) == names
    other = Outer(quantized(seed=1))
    other.load_state_dict(outer.state_dict())
    with torch.no_grad():
        assert torch.equal(other(X), outer(X))
    twice = nn.ModuleDict({"deep": nn.ModuleList([other])})
    assert {f"deep.0.{name}" for name in names} == set(twice.state_dict())
    twice.load_state_dict(twice.state_dict())


def test_missing_and_unexpected_names_are_reported(q):
    state = q.state_dict()
    state["down.weight.code"] = state.pop("down.weight.codes")
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*down\.weight\.codes.*Unexpected.*down\.weight\.code"):
        quantized().load_state_dict(state)


def test_repr_says_what_runs_how(q):
    assert repr(q).startswith("QuantizedModel(\n  8x64, w4a4, 2 of 2 matmuls\n")


def state_dicts_taken(module):
    """A list that gets the name of every module whose state is asked for, which unpacks the weights in it."""
    taken = []
    for name, part in module.named_modules():
        part.register_state_dict_pre_hook(lambda *_, name=name: taken.append(name))
    return taken


def test_asking_for_device_and_dtype_takes_no_state_dict():
    for q in (quantized(), lobcq_fx.quantize(nn.Sequential(nn.Linear(64, 8, bias=False)), [X])):
        taken = state_dicts_taken(q)
        assert (q.device, q.dtype) == (torch.device("cpu"), torch.float32)
        q.to("cpu")
        q(X)
        assert taken == []
    q.state_dict()
    assert any("weight" in name for name in taken)  # it would have been noticed


def test_generation_takes_no_state_dict():
    lm = own_causal_lm("llama")
    taken = state_dicts_taken(lm)
    for settings in ({}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}):
        lm.generate(torch.arange(3, 9).view(1, 6), max_new_tokens=3, eos_token_id=None, **settings)
    assert taken == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda q: copy.deepcopy(Outer(q)).inner])
def test_deep_copies_are_independent(duplicate):
    q = quantized()
    twin = duplicate(q)
    expected = q(X)
    assert torch.equal(twin(X), expected)
    assert set(twin.state_dict()) == NAMES
    assert twin.inventory == q.inventory
    twin.state_dict()["offset"].add_(100)
    twin.load_state_dict(quantized(seed=1).state_dict())
    assert not torch.equal(twin(X), expected)
    assert torch.equal(q(X), expected)
    with pytest.raises(LobcqError, match="cannot be cast"):
        twin.half()
    twin.to("meta")
    assert devices(q) == {"cpu"}


def test_wrong_calls_name_the_argument(q):
    with pytest.raises(
        CallError, match=r"argument x has shape \[2, 5, 40\]; the graph was traced for \[any, any, 64\]"
    ):
        q(X[..., :40])
    with pytest.raises(CallError, match="argument 'x' is missing"):
        q()


@torch.no_grad()
def test_a_causal_lm_behaves_the_same():
    lm = own_causal_lm("llama")
    ids = torch.arange(3, 9).view(1, 6) % VOCABULARY
    expected = lm(ids).logits
    for change in (lambda: lm.half(), lambda: Outer(lm).half(), lambda: lm.train()):
        with pytest.raises(LobcqError):
            change()
    twin = copy.deepcopy(lm)
    twin.load_state_dict(lm.state_dict())
    assert torch.equal(twin(ids).logits, expected)
    assert "model.layers.0.self_attn.q_proj.weight.codes" in lm.state_dict()
    lm.to("meta")
    assert lm(ids.to("meta")).logits.device.type == "meta"


@torch.no_grad()
def test_the_graph_for_static_caches_is_copied_and_moved_with_the_other():
    lm = quantized_causal_lm("llama")[1]
    ids = torch.arange(3, 9).view(1, 6) % VOCABULARY
    expected = lm(ids, past_key_values=lm.static_cache(9)).logits
    names = {str(node.target) for node in lm.stored_graph.find_nodes(op="get_attr")}
    assert set(lm.state_dict()) == names  # nothing that the other graph has to itself, or under a second name

    twin = copy.deepcopy(lm)
    assert torch.equal(twin(ids, past_key_values=twin.static_cache(9)).logits, expected)
    ours, theirs = (list(one.graphs["static_cache"].graph_module.buffers()) for one in (lm, twin))
    assert not {id(tensor) for tensor in ours} & {id(tensor) for tensor in theirs}
    for name, tensor in twin.state_dict().items():
        if name == "model.norm.weight":
            tensor.add_(1)
    changed = twin(ids, past_key_values=twin.static_cache(9)).logits
    torch.testing.assert_close(changed, twin(ids).logits)
    assert not torch.equal(changed, expected)

    twin.to("meta")
    assert twin(ids.to("meta"), past_key_values=twin.static_cache(9)).logits.device.type == "meta"
    for graph_module in (twin.graph_module, twin.graphs["static_cache"].graph_module):
        assert "device(type='cpu')" not in graph_module.code
        assert devices(graph_module) == {"meta"}
        assert all(tensor.device.type == "meta" for tensor in graph_module.buffers())

    back = copy.deepcopy(lm)
    back._restore()  # as a move does, of which there is no other kind on a machine without a second device
    back._prepack()
    assert torch.equal(back(ids, past_key_values=back.static_cache(9)).logits, expected)
    assert torch.equal(back(ids).logits, lm(ids).logits)
