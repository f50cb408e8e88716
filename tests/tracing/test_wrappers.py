"""Wrapped models are unwrapped; what is no model, and graphs within graphs, are refused with a remedy of their own."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import fx, nn

import lobcq_fx
from lobcq_fx.errors import TraceError
from lobcq_fx.pipeline import trace
from lobcq_fx.tracing.trace import trace_module
from lobcq_fx.tracing.wrappers import unwrapped
from tests.passes.graphs import Function, linear, values

X = values(3, 64)


def distributed(module, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(module)


@pytest.fixture
def process_group():
    yield
    torch.distributed.destroy_process_group()


def test_wrappers_come_off():
    module = linear(32, 64)
    assert unwrapped(module) is module
    for wrapped in (torch.compile(module), nn.DataParallel(module), torch.compile(nn.DataParallel(module))):
        assert unwrapped(wrapped) is module
        assert torch.equal(lobcq_fx.quantize(wrapped, example_inputs=X)(X), lobcq_fx.quantize(module, [X])(X))


@pytest.mark.usefixtures("process_group")
def test_distributed_wrappers_come_off(tmp_path):
    module = linear(32, 64)
    assert unwrapped(distributed(module, tmp_path)) is module


def jit(compile_, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates all of torch.jit
        return compile_(*args)


class Adapter(nn.Module):
    """As peft's PeftModel: known by the package that it comes from."""

    def forward(self, x):
        return x


Adapter.__module__ = "peft.peft_model"

REFUSED = {
    "scripted": (lambda: jit(torch.jit.script, linear(32, 64)), "RecursiveScriptModule: torch.jit has compiled it"),
    "traced": (lambda: jit(torch.jit.trace, linear(32, 64), (X,)), "TopLevelTracedModule: torch.jit has compiled it"),
    "exported": (lambda: torch.export.export(linear(32, 64), (X,)), "ExportedProgram: torch.export has captured it"),
    "its module": (
        lambda: torch.export.export(linear(32, 64), (X,)).module(),
        r"GraphModule: torch.export has captured it already\. Remedy: pass the Python module",
    ),
    "meta": (
        lambda: fx.symbolic_trace(nn.Sequential(linear(32, 64)).to("meta")),
        r"0\.weight is on the meta device, without values\. Remedy: load the weights first",
    ),
    "peft": (Adapter, r"Adapter: it is an adapter around a model\. .*model\.merge_and_unload\(\)"),
    "function": (lambda: torch.relu, r"it is no torch\.nn\.Module\. Remedy"),
    "class": (lambda: nn.Linear, r"it is a class\. Remedy: pass an instance"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_module_to_capture_is_named(case):
    make, message = REFUSED[case]
    with pytest.raises(TraceError, match=message):
        lobcq_fx.quantize(make(), example_inputs=X)


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


def test_outputs_of_an_unknown_type_are_named():
    model = Function(lambda m, x: Pair(m.layer(x), x), layer=linear(32, 64))
    with pytest.raises(
        TraceError, match=r"class '.*\.Pair'> in output.*Remedy: return tensors, or tuples, lists and dicts"
    ):
        trace(model, X)


def conditional(m, x):
    return torch.cond(x.sum() > 0, lambda y: m.layer(y), lambda y: m.layer(y) + 1, (x,))


def mapped(m, x):
    return torch.vmap(lambda row: m.layer(row))(x)


def cast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.layer(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (conditional, r"runs cond.*Remedy: choose between the branches' results with torch\.where"),
        (mapped, r"runs vmap \(File .*\.py.*Remedy: write the mapped dimension out"),
        (cast, r"runs wrap_with_autocast.*Remedy: take the torch\.autocast region out"),
    ],
)
def test_graphs_within_graphs_are_refused_by_the_operation_s_name(function, message):
    with pytest.raises(TraceError, match=message):
        trace_module(Function(function, layer=linear(32, 64)), (X,))


def test_an_error_of_the_model_s_own_has_another_remedy_than_control_flow():
    model = Function(lambda m, x: m.layer(x), layer=linear(32, 63))
    with pytest.raises(TraceError, match="Remedy: call the float model itself with example_inputs, with a batch of 2"):
        trace_module(model, (X,))
