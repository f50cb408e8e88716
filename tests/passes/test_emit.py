"""rewrite: constant matmuls become LO-BCQ ops; results, names, bytes and metadata, tied weights included."""

from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.config import LobcqConfig
from lobcq_fx.encoding import encode_weights
from lobcq_fx.errors import LobcqError
from lobcq_fx.float_weights import FloatWeights
from lobcq_fx.format import FormatSpec, encode, sqnr_db, universal_codebooks
from lobcq_fx.modules.packed_weight import PARTS, PackedWeight
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from lobcq_fx.passes.emit import Emit
from lobcq_fx.plan import QuantizationPlan
from tests.passes.graphs import (
    Function,
    assert_metadata,
    assert_unchanged,
    aten,
    decoded,
    fake_quantized,
    linear,
    lobcq,
    names,
    nodes,
    normalized,
    observe,
    parameter,
    reference,
    rewritten,
    run,
    targets,
    values,
)

OPS = {
    "w4a4": [lobcq.quantize_activation.default, lobcq.linear.default],
    "w4a8": [lobcq.quantize_activation_int8.default, lobcq.linear.int8_activation],
    "w4a16": [lobcq.linear.float_activation],
}
W4A16 = LobcqConfig(mode="w4a16")
STATIC = LobcqConfig(activation_scale="static")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


FORMS = {
    "linear": lambda: linear(36, 172),
    "linear without bias": lambda: linear(36, 172, bias=False),
    "addmm": lambda: Function(lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w).view(*x.shape[:2], 36),
                              w=parameter(172, 36), b=parameter(36)),
    "matmul by transposed": lambda: Function(lambda m, x: x @ m.w.T, w=parameter(36, 172)),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_replaced_and_equals_the_format_in_plain_torch(form, mode):
    model = FORMS[form]().eval()
    weight, bias = (getattr(model, "weight", None), getattr(model, "bias", None))
    if weight is None:
        weight, bias = model.w, getattr(model, "b", None)
    weight = weight.t() if form == "addmm" else weight  # 172 columns: a tail of 44 after two block arrays
    graph_module = normalized(model, values(2, 3, 172))
    assert aten.linear.default in targets(graph_module)

    result, (record,) = rewritten(graph_module, LobcqConfig(mode=mode))
    assert result.modified
    assert aten.linear.default not in targets(graph_module)
    assert [one for one in targets(graph_module) if one in chain(*OPS.values())] == OPS[mode]
    assert record.operation == form.split(" ")[0]
    assert record.shape == (36, 172)
    assert (record.format, record.mode, record.reason) == ("8x64", mode, None)
    encoded = encode(weight.detach(), FormatSpec(), universal_codebooks(8), search_scales=True)
    assert (record.float_bytes, record.packed_bytes) == (4 * 36 * 172, encoded.nbytes)
    assert record.weight_sqnr_db == pytest.approx(sqnr_db(weight.detach(), encoded))

    for leading in ((2, 3), (1, 1), (1, 6), (7, 1), (0, 3)):
        x = values(*leading, 172)
        close(run(graph_module, x), reference(x, weight.detach(), bias, mode=mode))
    x = values(2, 3, 172)
    assert not torch.allclose(run(graph_module, x), model(x), rtol=1e-3, atol=1e-3)  # it does quantize
    assert_metadata(graph_module, values(5, 2, 172))
    assert_metadata(graph_module, values(1, 1, 172))
    plan = QuantizationPlan.of(normalized(model, x), LobcqConfig(mode=mode))
    assert_unchanged(Emit(plan, CodebookSets.universal({FormatSpec()})), graph_module)


@pytest.mark.parametrize("name", ["1x16", "2x128", "16x32"])
def test_every_format(name):
    spec = FormatSpec.from_name(name)
    layer = linear(36, 172)
    graph_module = normalized(layer, values(2, 3, 172))
    rewritten(graph_module, LobcqConfig(format=name))
    x = values(4, 5, 172)
    close(run(graph_module, x), reference(x, layer.weight.detach(), layer.bias, spec))
    assert_metadata(graph_module, x)


def test_packed_weights_stand_under_the_float_parameter_s_name():
    graph_module = normalized(nn.Sequential(linear(64, 64), linear(32, 64)))
    float_names = {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert names(graph_module) == float_names
    rewritten(graph_module)
    packed = {f"{layer}.weight.{part}" for layer in "01" for part in PARTS}
    assert names(graph_module) == packed | {"0.bias", "1.bias", "lobcq.codebooks"}
    assert isinstance(graph_module.get_submodule("0.weight"), PackedWeight)
    assert {node.target for node in graph_module.graph.nodes if node.op == "get_attr"} == names(graph_module)


def test_a_layer_called_twice_is_packed_once():
    layer = linear(64, 64)
    model = Function(lambda m, x: m.layer(torch.relu(m.layer(x))), layer=layer)
    graph_module = normalized(model)
    _, (first, second) = rewritten(graph_module)
    assert (first.layer, second.layer) == ("layer", "layer")
    assert first.packed_bytes > 0
    assert (second.packed_bytes, second.float_bytes) == (0, 0)
    assert len([name for name in names(graph_module) if name.endswith(".codes")]) == 1
    x = values(1, 5, 64)
    w, b = layer.weight.detach(), layer.bias
    close(run(graph_module, x), reference(torch.relu(reference(x, w, b)), w, b))


@pytest.mark.parametrize(("mode", "divisor"), [("w4a4", 13888), ("w4a8", 56896)])
def test_a_layer_called_twice_has_two_static_scales(mode, divisor):
    config = replace(STATIC, mode=mode)
    layer = linear(64, 64)
    model = Function(lambda m, x: m.layer(100 * m.layer(x)), layer=layer)
    graph_module = normalized(model)
    observe(graph_module, config)
    x = values(2, 5, 64)
    inner = 100 * run(graph_module, x).new_tensor(0) + 100 * nn.functional.linear(x, layer.weight, layer.bias).detach()
    rewritten(graph_module, config)
    scales = [graph_module.layer.activation_scale, graph_module.layer.activation_scale_1]
    expected = [x.abs().max() / divisor, inner.abs().max() / divisor]
    torch.testing.assert_close(scales, expected)
    w = decoded(layer.weight)
    hidden = nn.functional.linear(fake_quantized(x, scale=scales[0], mode=mode), w, layer.bias)
    again = fake_quantized(100 * hidden, scale=scales[1], mode=mode)
    close(run(graph_module, x), nn.functional.linear(again, w, layer.bias))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(48, 64)
        self.head = nn.Linear(64, 48, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


@torch.no_grad()
def test_a_tied_embedding_stays_in_float_beside_the_packed_head():
    model = Tied()
    ids = torch.arange(8).view(2, 4)
    graph_module = normalized(model, ids)
    (weight,) = names(graph_module)  # one name of the two
    _, (record,) = rewritten(graph_module, LobcqConfig(exclude=()))
    EliminateDeadCode()(graph_module)
    assert record.layer == "head"
    packed = "head.weight_packed" if weight == "head.weight" else "head.weight"
    assert names(graph_module) == {weight, "lobcq.codebooks"} | {f"{packed}.{part}" for part in PARTS}
    # Nothing was saved: the float weight stays, the packed one comes on top.
    assert (record.float_bytes, record.packed_bytes > 0) == (0, True)
    other = torch.tensor([[5, 47, 0]])
    close(run(graph_module, other), reference(model.embed(other), model.head.weight))
    assert_metadata(graph_module, other)


def test_a_tied_weight_that_every_reader_packs_leaves_no_float_behind():
    first, second = linear(64, 64, bias=False), linear(64, 64, bias=False)
    second.weight = first.weight
    graph_module = normalized(Function(lambda m, x: m.b(torch.relu(m.a(x))), a=first, b=second))
    (weight,) = names(graph_module)
    _, (one, two) = rewritten(graph_module)
    assert [one.layer, two.layer] == ["a", "b"]
    assert names(graph_module) == {"lobcq.codebooks"} | {f"{weight}.{part}" for part in PARTS}


def test_two_formats_for_one_weight():
    first, second = linear(64, 64, bias=False), linear(64, 64, bias=False)
    second.weight = first.weight
    model = Function(lambda m, x: m.b(torch.relu(m.a(x))), a=first, b=second)
    graph_module = normalized(model)
    _, (one, two) = rewritten(graph_module, LobcqConfig(overrides={"b": {"format": "16x32"}}))
    assert [one.format, two.format] == ["8x64", "16x32"]
    assert {"lobcq.codebooks", "lobcq.codebooks_1"} < names(graph_module)
    assert sum(name.endswith(".codes") for name in names(graph_module)) == 2
    assert (one.float_bytes, two.float_bytes) == (0, 64 * 64 * 4)  # the float weight goes with the second
    x = values(3, 1, 64)
    w = first.weight.detach()
    close(run(graph_module, x), reference(torch.relu(reference(x, w)), w, spec=FormatSpec(16, 32)))


@pytest.mark.parametrize("config", [LobcqConfig(), STATIC])
def test_a_bare_parameter_read_both_ways(config):
    model = Function(lambda m, x: (x @ m.w) @ m.w.t(), w=parameter(64, 48))
    graph_module = normalized(model)
    observe(graph_module, config)
    x = values(2, 3, 64)
    run(graph_module, x)
    rewritten(graph_module, config)
    EliminateDeadCode()(graph_module)
    assert sum(name.endswith(".codes") for name in names(graph_module)) == 2
    assert all(not isinstance(value, nn.Parameter) for value in graph_module.parameters())
    assert_metadata(graph_module, x)
    if config is not STATIC:
        w = model.w.detach()
        close(run(graph_module, x), reference(reference(x, w.t()), w))


def test_a_bare_parameter_that_something_else_reads():
    model = Function(lambda m, x: (x @ m.w) + m.w.sum(), w=parameter(64, 48))
    graph_module = normalized(model)
    rewritten(graph_module)
    assert "w" in names(graph_module)
    assert {f"w_weight.{part}" for part in PARTS} < names(graph_module)
    x = values(1, 3, 64)
    close(run(graph_module, x), reference(x, model.w.detach().t()) + model.w.sum())


def test_a_mixture_of_modes_and_exclusions_by_layer():
    members = {name: linear(64, 64, seed=seed) for seed, name in enumerate("abc")}
    model = Function(lambda m, x: m.c(m.b(m.a(x))), **members)
    graph_module = normalized(model)
    rewritten(graph_module, LobcqConfig(exclude=["c"], overrides={"b": {"mode": "w4a16"}}))
    expected = [
        lobcq.quantize_activation.default,
        lobcq.linear.default,
        lobcq.linear.float_activation,
        aten.linear.default,
    ]
    assert [target for target in targets(graph_module) if target in expected] == expected
    x = values(2, 3, 64)
    hidden = reference(x, model.a.weight, model.a.bias)
    hidden = reference(hidden, model.b.weight, model.b.bias, mode="w4a16")
    close(run(graph_module, x), model.c(hidden))


def test_static_scales_need_observers():
    with pytest.raises(AssertionError, match="run insert_observers and calibrate first"):
        rewritten(normalized(linear(32, 64)), STATIC)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_with_its_index_and_the_remedy(bad):
    model = nn.Sequential(linear(64, 64), linear(32, 64))
    with torch.no_grad():
        model[1].weight[3, 17] = bad
    with pytest.raises(LobcqError, match=r"cannot encode 1\.weight: x\[3, 17\] is (nan|-inf).*exclude the layer"):
        rewritten(normalized(model))


def test_progress_counts_weights():
    graph_module = normalized(nn.Sequential(linear(64, 64), linear(64, 64), linear(32, 64)))
    calls = []
    plan = QuantizationPlan.of(graph_module, LobcqConfig())
    encode_weights(
        plan, FloatWeights(graph_module), CodebookSets.universal({FormatSpec()}), progress=lambda *c: calls.append(c)
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_codebook_sets_are_stored_once_and_named_in_order():
    specs = [FormatSpec(8, 64), FormatSpec(8, 32), FormatSpec(4, 64)]
    universal = CodebookSets.universal(set(specs))
    assert universal.weights[specs[0]] is universal.activations[specs[1]]
    assert len(universal.named()) == 2
    own = torch.zeros(8, 16, dtype=torch.int8)
    sets = CodebookSets({specs[0]: universal_codebooks(8)}, {specs[0]: own})
    assert list(sets.named()) == ["lobcq.codebooks", "lobcq.codebooks_1"]
    assert sets.name_of(own) == "lobcq.codebooks_1"


def test_weights_and_activations_use_each_their_own_set():
    spec = FormatSpec()
    own = torch.arange(-15, 17, 2, dtype=torch.int8).mul(2).expand(8, 16).contiguous().clamp(-31, 31)
    layer = linear(32, 64)
    graph_module = normalized(layer)
    rewritten(graph_module, codebooks=CodebookSets({spec: universal_codebooks(8)}, {spec: own}))
    (quantize,) = nodes(graph_module, lobcq.quantize_activation.default)
    (op,) = nodes(graph_module, lobcq.linear.default)
    assert quantize.args[1].target == "lobcq.codebooks_1"
    assert [node.target for node in (op.args[4], op.args[9])] == ["lobcq.codebooks_1", "lobcq.codebooks"]


def live_bytes():
    """Bytes behind every tensor that is alive in this process."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.no_grad()
@pytest.mark.parametrize("inplace", [True, False])
def test_float_weights_are_freed_one_by_one(inplace):
    layers, size = 6, 512
    layer_bytes = 4 * size * size
    gc.collect()
    before = live_bytes()
    model = nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(layers)]).eval()
    model[5].weight = model[4].weight  # tied: five weights in all
    x = values(2, size)
    expected = model(x)
    counts = []

    def progress(step, done, total):
        if step == "encode":
            counts.append((live_bytes() - before) / layer_bytes)

    q = lobcq_fx.quantize(model, example_inputs=x, inplace=inplace, progress=progress)
    assert len(counts) == 5
    for done, count in enumerate(counts, start=1):
        floats = 5 - done if inplace else 5
        assert floats < count < floats + done * 4.5 / 32 * 1.02 + 0.1
    assert (model[0].weight.numel() == 0) == inplace
    if not inplace:
        assert torch.equal(model(x), expected)
    assert (q(x) - expected).norm() < 0.5 * expected.norm()


PEAK = """
import resource, torch
from torch import nn
import lobcq_fx

LAYERS, SIZE = 3, 3072
MIB = 2**20
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)])
model.to_empty(device="cpu")
warm = nn.Sequential(nn.Linear(64, 64)).eval()
lobcq_fx.quantize(warm, example_inputs=torch.randn(2, 64))(torch.randn(2, 64))  # everything is imported
with torch.no_grad():
    for layer in model:
        layer.weight.uniform_(-1, 1)
before = peak()
lobcq_fx.quantize(model.eval(), example_inputs=torch.randn(2, SIZE), inplace=True)
print((peak() - before) / MIB)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux alone")
def test_the_peak_stays_below_the_float_model_and_one_layer():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    layer = 3072 * 3072 * 4 / 2**20
    assert float(done.stdout) < layer
