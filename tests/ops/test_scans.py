"""The scans of models with states, against their recurrences token by token in fp64."""

from __future__ import annotations

import pytest
import torch

import lobcq_fx.ops
from lobcq_fx.errors import LobcqError, OperandError
from lobcq_fx.kernels.bind import bind_cpu_core

bind_cpu_core()
BATCH, TOKENS, HEADS, WIDTH, GROUPS, STATES = 2, 75, 4, 3, 2, 5
lobcq = torch.ops.lobcq


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def selective():
    sizes = (BATCH, HEADS, TOKENS)
    return {
        "x": random(*sizes) - 0.5, "dt": random(*sizes, seed=1), "A": -4 * random(HEADS, STATES),
        "B": random(BATCH, TOKENS, STATES, seed=2) - 0.5, "C": random(BATCH, TOKENS, STATES, seed=3) - 0.5,
        "state": random(BATCH, HEADS, STATES, seed=4),
    }  # fmt: skip


def chunked():
    return {
        "x": random(BATCH, TOKENS, HEADS, WIDTH) - 0.5, "dt": random(BATCH, TOKENS, HEADS), "A": -4 * random(HEADS),
        "B": random(BATCH, TOKENS, GROUPS, STATES, seed=2) - 0.5,
        "C": random(BATCH, TOKENS, GROUPS, STATES, seed=3) - 0.5,
        "state": random(BATCH, HEADS, WIDTH, STATES, seed=4), "dt_min": 0.2, "dt_max": 0.7, "chunk_size": 16,
    }  # fmt: skip


def delta():
    keys = torch.nn.functional.normalize(random(BATCH, HEADS, TOKENS, WIDTH) - 0.5, dim=-1)
    return {
        "query": random(BATCH, HEADS, TOKENS, WIDTH, seed=1) - 0.5, "key": keys,
        "value": random(BATCH, HEADS, TOKENS, STATES, seed=2) - 0.5, "decay": -random(BATCH, HEADS, TOKENS),
        "beta": random(BATCH, HEADS, TOKENS, seed=3), "state": random(BATCH, HEADS, WIDTH, STATES, seed=4),
        "chunk_size": 16,
    }  # fmt: skip


CALLS = {"selective_scan": selective, "chunk_scan": chunked, "gated_delta_rule": delta}
TOKENS_IN = {
    "selective_scan": {"x": 2, "dt": 2, "B": 1, "C": 1},
    "chunk_scan": {"x": 1, "dt": 1, "B": 1, "C": 1},
    "gated_delta_rule": {"query": 2, "key": 2, "value": 2, "decay": 2, "beta": 2},
}


def part(op, call, start, stop):
    """The same call of some of its tokens."""
    cut = {name: call[name].narrow(dim, start, stop - start) for name, dim in TOKENS_IN[op].items()}
    return {**call, **cut}


def expected(op, call):
    """By the recurrences as the papers have them."""
    call = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    state, outs = call["state"], []
    if op == "gated_delta_rule":
        for q, k, v, decay, beta in zip(*(call[name].unbind(2) for name in TOKENS_IN[op]), strict=True):
            state = decay.exp()[..., None, None] * state
            error = v - torch.einsum("bhk,bhkv->bhv", k, state)
            state = state + torch.einsum("bhk,bhv->bhkv", k, beta[..., None] * error)
            outs.append(torch.einsum("bhk,bhkv->bhv", q, state))
        return torch.stack(outs, 2), state
    dim = TOKENS_IN[op]["x"]
    for x, dt, B, C in zip(*(call[name].unbind(dim) for name, dim in TOKENS_IN[op].items()), strict=True):
        if op == "selective_scan":
            state = (dt[..., None] * call["A"]).exp() * state + (dt * x)[..., None] * B[:, None]
            outs.append(torch.einsum("bin,bn->bi", state, C))
        else:
            step = dt.clamp(call["dt_min"], call["dt_max"]) if call["x"].shape[1] > 1 else dt
            B, C = (one.repeat_interleave(HEADS // GROUPS, dim=1) for one in (B, C))
            decay = (step * call["A"]).exp()[..., None, None]
            state = decay * state + torch.einsum("bhp,bhn->bhpn", step[..., None] * x, B)
            outs.append(torch.einsum("bhpn,bhn->bhp", state, C))
    return torch.stack(outs, dim), state


def assert_right(op, call):
    for run in (getattr(lobcq, op), getattr(lobcq_fx.ops, op)):
        results = run(*call.values())
        for actual, wanted in zip(results, expected(op, call), strict=True):
            assert (actual.dtype, actual.is_contiguous()) == (torch.float32, True)
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5)
        assert results[1].data_ptr() != call["state"].data_ptr()


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, TOKENS])
def test_a_scan_is_its_recurrence(op, tokens):
    assert_right(op, part(op, CALLS[op](), 0, tokens))


@pytest.mark.parametrize("op", CALLS)
def test_a_scan_goes_on_from_a_state(op):
    call = CALLS[op]() | ({"dt_min": 0.0, "dt_max": float("inf")} if op == "chunk_scan" else {})
    whole, last = getattr(lobcq, op)(*call.values())
    state, parts = call["state"], []
    for start, stop in ((0, 20), (20, 21), (21, 21), (21, TOKENS)):
        out, state = getattr(lobcq, op)(*(part(op, call, start, stop) | {"state": state}).values())
        parts.append(out)
    dim = TOKENS_IN[op]["x" if "x" in call else "query"]
    torch.testing.assert_close(torch.cat(parts, dim), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", CALLS)
def test_operands_lie_anywhere(op):
    call = part(op, CALLS[op](), 3, 40)
    assert not next(iter(call.values())).is_contiguous()
    assert_right(op, call)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_opcheck(op, tokens):
    call = part(op, CALLS[op](), 0, tokens)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(lobcq, op).default, tuple(call.values()), test_utils=tests)


@pytest.mark.parametrize("op", ["chunk_scan", "gated_delta_rule"])
@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunks_without_tokens_are_refused(op, chunk_size):
    with pytest.raises(OperandError, match=f"lobcq::{op}: chunk_size is {chunk_size}"):
        getattr(lobcq, op)(*(CALLS[op]() | {"chunk_size": chunk_size}).values())


def test_groups_that_do_not_divide_the_heads_are_refused():
    three = random(BATCH, TOKENS, 3, STATES)
    with pytest.raises(OperandError, match="B has 3 groups for 4 heads"):
        lobcq.chunk_scan(*(chunked() | {"B": three, "C": three}).values())


@pytest.mark.parametrize("op", CALLS)
def test_gradients_are_refused(op):
    call = CALLS[op]()
    first = next(iter(call))
    with pytest.raises(LobcqError, match="inference only"):
        getattr(lobcq, op)(*(call | {first: call[first].requires_grad_()}).values())[0].sum().backward()
