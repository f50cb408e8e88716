"""Names that FX, Python or the package have a use for: such models are quantized, called, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.tracing.names import usable_name
from tests.families import fake_quantized
from tests.passes.graphs import linear, values

NAMES = ["graph", "code", "meta", "class", "def", "recompile", "lobcq", "with space", "a-b", 'qu"ote', "new\nline", "0"]


class Named(nn.Module):
    """A linear and a buffer of one name in containers, and a linear of it that is the model's own."""

    def __init__(self, name):
        super().__init__()
        self.own, self.name = linear(64, 64), name
        self.add_module(name, linear(64, 64, seed=1))
        self.layers = nn.ModuleDict({name: linear(64, 64, seed=2)})
        self.values = nn.ParameterDict({name: nn.Parameter(values(64))})
        self.buffers_of = nn.Module()
        self.buffers_of.register_buffer(name, values(64, seed=3))

    def forward(self, x):
        x = self._modules[self.name](self.own(x)) * self.values[self.name] + self.buffers_of._buffers[self.name]
        return self.layers[self.name](x)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_such_names_is_quantized_called_saved_and_loaded(name, tmp_path):
    model, x = Named(name).eval(), values(2, 5, 64)
    q = lobcq_fx.quantize(model, config=LobcqConfig(mode="w4a16"), example_inputs=x)
    with fake_quantized(model, ["own", name, f"layers.{name}"], mode="w4a16"):
        torch.testing.assert_close(q(x), model(x), rtol=1e-4, atol=1e-4)
    q.save_pretrained(tmp_path / "saved")
    assert torch.equal(lobcq_fx.load(tmp_path / "saved")(x), q(x))


def test_two_names_that_would_become_one():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"a b": linear(64, 64), "a_b": linear(64, 64, seed=1), "a+b": linear(64, 64)})

        def forward(self, x):
            return self.layers["a b"](x) - self.layers["a_b"](x) + self.layers["a+b"](x)

    model, x = Both().eval(), values(2, 64)
    q = lobcq_fx.quantize(model, config=LobcqConfig(mode="w4a16"), example_inputs=x)
    with torch.no_grad(), fake_quantized(model, [f"layers.{name}" for name in model.layers], mode="w4a16"):
        torch.testing.assert_close(q(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "usable"),
    [
        ("model.layers.0.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("graph.weight", "graph_.weight"),
        ("layers.graph.weight", "layers.graph.weight"),
        ("layers.class.weight", "layers.class_.weight"),
        ("with space.bias", "with_space.bias"),
        ("key-with-hyphen.w", "key-with-hyphen.w"),
    ],
)
def test_usable_names_stay(name, usable):
    assert usable_name(name) == usable
