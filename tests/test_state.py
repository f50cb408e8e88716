"""Quantizing a model, and calling what comes of it, leaves the float model and the calibration data as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.graph.written import module_kept
from tests.families import fake_quantized
from tests.passes.graphs import linear, values


class Stateful(nn.Module):
    """A linear, and state that `forward`, given as a function, writes to."""

    def __init__(self, forward):
        super().__init__()
        self.function, self.layer, self.calls = forward, linear(64, 64), 0
        self.register_buffer("count", torch.zeros(64))
        self.register_buffer("first", self.count[:8])  # the same memory
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("variance", torch.ones(64))
        self.plain = torch.zeros(64)

    def forward(self, x):
        return self.function(self, x)


def counts(m, x):
    m.count.add_(1)
    m.calls += 1
    return m.layer(x) * m.count


def assigns(m, x):
    m.count = m.count + x.mean()
    return m.layer(x) + m.count


def writes_a_view(m, x):
    m.count.view(8, 8)[0].add_(2)
    return m.layer(x) + m.count


def writes_by_another_name(m, x):
    m.first.add_(1)
    return m.layer(x) + m.count


def writes_a_plain_tensor(m, x):
    m.plain.add_(1)
    return m.layer(x) + m.plain


def writes_a_parameter(m, x):
    with torch.no_grad():
        m.layer.bias.add_(1)
    return m.layer(x)


def normalizes_by_running_statistics(m, x):
    y = m.layer(x).transpose(1, 2)
    return nn.functional.batch_norm(y, m.mean, m.variance, training=True) * m.mean[:, None]


def keeps_statistics_alone(m, x):
    """The normalized values are read by nobody."""
    nn.functional.batch_norm(x.transpose(1, 2), m.mean, m.variance, training=True)
    return m.layer(x) + m.mean


def writes_its_input(m, x):
    x.add_(1)
    return m.layer(x)


def writes_a_part_of_its_input(m, x):
    x[:, 0].mul_(2)
    return m.layer(x)


FORWARDS = [
    counts, assigns, writes_a_view, writes_by_another_name, writes_a_plain_tensor, writes_a_parameter,
    normalizes_by_running_statistics, keeps_statistics_alone, writes_its_input, writes_a_part_of_its_input,
]  # fmt: skip


def snapshot(model):
    """Every tensor by value and every attribute of the model, whose function is no part of its state."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors | {"plain": model.plain.clone()}, {**vars(model), "_buffers": None, "plain": None}


@torch.no_grad()
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("forward", FORWARDS)
def test_the_float_model_and_the_data_stay_and_calls_count_from_where_it_is(forward, calibrated):
    model = Stateful(forward).eval()
    twin = copy.deepcopy(model)
    twin.register_buffer("first", twin.count[:8])
    buffers = dict(model.named_buffers())
    before = snapshot(model)
    x = values(2, 5, 64)
    data = [x.clone() for _ in range(3)] if calibrated else None
    q = lobcq_fx.quantize(model, data, LobcqConfig(mode="w4a16"), example_inputs=x)
    for _ in range(2):  # what calls write stays in the quantized model, as it would in the float one
        mine, its = x.clone(), x.clone()
        actual = q(mine)
        with fake_quantized(twin, ["layer"], mode="w4a16"):
            expected = twin(its)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(mine, its)
    after = snapshot(model)
    for name, tensor in before[0].items():
        assert torch.equal(after[0][name], tensor), name
    assert after[1] == before[1]
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert torch.equal(x, values(2, 5, 64))
    assert all(torch.equal(item, x) for item in data or [])


@torch.no_grad()
def test_what_calls_wrote_is_saved(tmp_path):
    q = lobcq_fx.quantize(Stateful(counts).eval(), example_inputs=values(2, 5, 64))
    q(values(2, 5, 64))
    q.save_pretrained(tmp_path / "saved")
    loaded = lobcq_fx.load(tmp_path / "saved")
    assert torch.equal(loaded(values(2, 5, 64)), q(values(2, 5, 64)))


def test_hooks_that_a_call_installs_are_gone_with_what_says_that_they_are_there():
    """As transformers installs those that capture hidden states, once for a model."""
    model = nn.Linear(4, 4)
    hook = model.register_forward_hook(lambda *_: None)
    with module_kept(model):
        model.installed = True
        model.register_forward_hook(lambda *_: None)
    assert list(model._forward_hooks) == [hook.id]
    assert not hasattr(model, "installed")
