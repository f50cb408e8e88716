"""Folders of mixtures of experts: what was saved comes back, and what somebody made of it is refused or harmless."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lobcq_fx
from lobcq_fx.errors import CheckpointError
from lobcq_fx.storage.shards import WEIGHTS
from tests.passes.graphs import values
from tests.passes.test_grouped_products import EXPERTS, STACK, TOKENS, Experts, K, N
from tests.storage.reindex import reindex


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = Experts(nn.Parameter(STACK.detach().clone())).bfloat16()
    x = values(TOKENS, K).bfloat16()
    q = lobcq_fx.quantize(model, config=lobcq_fx.LobcqConfig(exclude=["router"]), example_inputs=(x,))
    folder = tmp_path_factory.mktemp("saved") / "q"
    q.save_pretrained(folder)
    return folder, x, q(x)


def test_the_same_bits_come_back(saved):
    folder, x, expected = saved
    assert torch.equal(lobcq_fx.load(folder)(x), expected)
    tensors = load_file(folder / WEIGHTS)
    assert tensors["w.codes"].shape == (EXPERTS, N, 64)
    assert tensors["w.tensor_scale"].shape == (EXPERTS,)


def scaled(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


TENSORS = {
    "one scale for all": ("w.tensor_scale", lambda t: t[0].clone(), "w.tensor_scale is torch.float32 []"),
    "a scale too few": ("w.tensor_scale", lambda t: t[:3].clone(), "w.tensor_scale is torch.float32 [3]"),
    "a scale that is not finite": ("w.tensor_scale", lambda t: scaled(t, 2, torch.inf), "w.tensor_scale is inf"),
    "a negative scale": ("w.tensor_scale", lambda t: scaled(t, 3, -1.0), "w.tensor_scale is -1.0"),
    "one matrix": ("w.codes", lambda t: t[0].clone(), "w.codes is [24, 64]: a stack of weights has [E, N, ...]"),
    "no matrix": ("w.codes", lambda t: t[:0].clone(), "w.codes is [0, 24, 64]: a stack of weights"),
    "a matrix too few": ("w.codes", lambda t: t[:3].clone(), "w.selectors is torch.uint8 [4, 24, 6]"),
    "selectors that are too short": ("w.selectors", lambda t: t[..., :5].clone(), "w.selectors is torch.uint8"),
    "block-array scales of NaN": ("w.scales", lambda t: (t.view(torch.uint8) | 0x7F).view(t.dtype), "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_damaged_stacks_are_refused(saved, tmp_path, case):
    folder = tmp_path / "q"
    shutil.copytree(saved[0], folder)
    name, change, says = TENSORS[case]
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    reindex(folder)
    with pytest.raises(CheckpointError) as raised:
        lobcq_fx.load(folder)
    assert says in str(raised.value)


def changed(saved, tmp_path, change):
    """The folder with another graph: `change` is called with its nodes by name and the grouped linear's arguments."""
    folder = tmp_path / "q"
    shutil.copytree(saved[0], folder)
    graph = json.loads((folder / "graph.json").read_text())
    nodes = {node["name"]: node for node in graph["nodes"]}
    grouped = next(node for node in graph["nodes"] if "grouped_linear" in node["target"])
    change(graph["nodes"], nodes, grouped["args"]["tuple"])
    (folder / "graph.json").write_text(json.dumps(graph))
    reindex(folder)
    return folder


OFFSETS, ROWS = 10, 11


def node_before(nodes, name, target, *args):
    place = next(i for i, node in enumerate(nodes) if "grouped_linear" in node["target"])
    made = {"name": name, "op": "call_function", "target": target, "args": {"tuple": list(args)}}
    nodes.insert(place, {**made, "kwargs": {"dict": []}})
    return {"node": name}


@pytest.mark.parametrize(
    "change",
    [
        lambda nodes, named, args: args.__setitem__(OFFSETS, args[ROWS]),
        lambda nodes, named, args: args.__setitem__(ROWS, args[OFFSETS]),
        lambda nodes, named, args: args.__setitem__(OFFSETS, None),
        lambda nodes, named, args: args.__setitem__(
            OFFSETS, node_before(nodes, "fewer", "ops.aten.slice.Tensor", args[OFFSETS], 0, 0, 3)
        ),
        lambda nodes, named, args: args.__setitem__(
            ROWS, node_before(nodes, "two", "ops.aten.unsqueeze.default", args[ROWS], 0)
        ),
    ],
    ids=["rows as offsets", "offsets as rows", "no offsets", "offsets too few", "rows in two dimensions"],
)
def test_graphs_whose_groups_fit_nothing_are_refused(saved, tmp_path, change):
    with pytest.raises(CheckpointError, match=r"graph\.json"):
        lobcq_fx.load(changed(saved, tmp_path, change))


@pytest.mark.parametrize("factor", [2**40, -1])
def test_rows_that_do_not_exist_are_an_error(saved, tmp_path, factor):
    def far(nodes, named, args):
        args[ROWS] = node_before(nodes, "far", "ops.aten.mul.Scalar", args[ROWS], factor)

    q = lobcq_fx.load(changed(saved, tmp_path, far))
    with pytest.raises(Exception, match="rows reach from"):
        q(saved[1])


@pytest.mark.parametrize("factor", [2**30, -1, 0])
def test_ends_of_groups_may_be_any_numbers(saved, tmp_path, factor):
    def far(nodes, named, args):
        args[OFFSETS] = node_before(nodes, "far", "ops.aten.mul.Scalar", args[OFFSETS], factor)

    q = lobcq_fx.load(changed(saved, tmp_path, far))
    assert q(saved[1]).shape == (2 * TOKENS, N)
    if factor <= 0:
        assert not q(saved[1]).any()
