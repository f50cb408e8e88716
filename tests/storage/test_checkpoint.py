"""Saved models: bit-identical after loading, nothing unpickled, every kind of damage named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import lobcq_fx
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CallError, CheckpointError, ConfigError
from lobcq_fx.format import FormatSpec, encode, universal_codebooks
from lobcq_fx.modules.packed_weight import PARTS, PackedWeight
from lobcq_fx.storage.checkpoint import is_checkpoint
from tests.families import quantized_causal_lm
from tests.passes.graphs import Function, linear, parameter, values
from tests.storage.reindex import reindex


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(172, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 8)).eval()


def tied():
    first, second = linear(172, 172, bias=False), linear(172, 172, bias=False)
    second.weight = first.weight
    bare = parameter(172, 64)
    return Function(lambda m, x: m.b(torch.relu(m.a(x))) @ m.w + m.w.sum(), a=first, b=second, w=bare)


def codebook_file(folder):
    path = folder / "codebooks.json"
    path.write_text(json.dumps({"codebooks": {"8": [[round((j - 7.5) * 31 / 7.5) for j in range(16)]] * 8}}))
    return str(path)


SETTINGS = {
    "w4a4": (model, lambda folder: LobcqConfig()),
    "w4a16": (model, lambda folder: LobcqConfig(mode="w4a16", format="16x32")),
    "w4a8": (model, lambda folder: LobcqConfig(mode="w4a8", activation_scale="static")),
    "static": (model, lambda folder: LobcqConfig(activation_scale="static", format="2x128")),
    "mixed": (model, lambda folder: LobcqConfig(overrides={"2": {"format": "1x16"}, "3": {"mode": "w4a16"}})),
    "tied": (tied, lambda folder: LobcqConfig()),
    "tied, static": (tied, lambda folder: LobcqConfig(activation_scale="static")),
    "codebook file": (model, lambda folder: LobcqConfig(codebooks=codebook_file(folder))),
}


def quantized(case, folder):
    make, config = SETTINGS[case]
    return lobcq_fx.quantize(make(), [values(3, 172, seed=s) for s in range(3)], config(folder))


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("case", SETTINGS)
def test_loaded_outputs_state_and_settings_are_identical(case, tmp_path):
    q = quantized(case, tmp_path)
    q.save_pretrained(tmp_path / "q")
    if case == "codebook file":
        Path(q.lobcq_config.codebooks).unlink()  # the folder holds what it needs
    loaded = lobcq_fx.load(tmp_path / "q")
    for rows in (1, 5):
        x = values(rows, 172, seed=9)
        assert torch.equal(loaded(x), q(x))
    assert loaded.graph_module.code == q.graph_module.code
    assert loaded.lobcq_config == q.lobcq_config
    assert loaded.inventory == q.inventory
    before, after = q.state_dict(), loaded.state_dict()
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(raw(after[name]), raw(tensor)), name
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in q.named_parameters()}
    assert {n for n, m in loaded.named_modules() if isinstance(m, PackedWeight)} == {
        n for n, m in q.named_modules() if isinstance(m, PackedWeight)
    }
    loaded.save_pretrained(tmp_path / "again")
    for name in ("lobcq.safetensors", "config.json", "graph.json", "inventory.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "q" / name).read_bytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "q"
    quantized("static", folder.parent).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "q")
    return tmp_path / "q"


def test_plain_safetensors_reads_the_format_s_names_and_layout(saved):
    tensors = load_file(saved / "lobcq.safetensors")
    spec = FormatSpec.from_name("2x128")
    encoded = encode(model()[0].weight.detach(), spec, universal_codebooks(2), search_scales=True)
    assert set(tensors) == {
        *(f"{layer}.weight.{part}" for layer in "023" for part in PARTS),
        *(f"{layer}.{rest}" for layer in "023" for rest in ("bias", "activation_scale")),
        *("1.weight", "1.bias", "lobcq.codebooks"),
    }
    for part in PARTS:
        assert torch.equal(raw(tensors[f"0.weight.{part}"]), raw(getattr(encoded, part)))
    assert tensors["0.weight.codes"].shape == (64, 256 // 2)  # 172 columns padded to 256
    assert tensors["0.weight.selectors"].shape == (64, 256 // 8 // 8)
    assert tensors["0.weight.scales"].dtype == torch.float8_e4m3fn
    assert tensors["0.weight.scales"].shape == (64, 2)
    assert tensors["0.weight.tensor_scale"].shape == ()
    assert tensors["lobcq.codebooks"].dtype == torch.int8


def test_nothing_is_unpickled(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "graph.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    lobcq_fx.load(folder)
    with pytest.raises(FileNotFoundError):
        (tmp_path / "exploded").stat()
    (folder / "lobcq.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"cannot read .*lobcq\.safetensors"):
        lobcq_fx.load(folder)
    assert not (tmp_path / "exploded").exists()


def alter(name, change):
    def damage(folder):
        tensors = load_file(folder / "lobcq.safetensors")
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / "lobcq.safetensors")

    return damage


def drop_tensor(folder):
    tensors = load_file(folder / "lobcq.safetensors")
    del tensors["2.weight.scales"]
    save_file(tensors, folder / "lobcq.safetensors")


def edit(file, change):
    def damage(folder):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return damage


def truncate(file, share):
    def damage(folder):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return damage


def put(tensor, value):
    bytes_of = tensor.reshape(-1).view(torch.uint8).clone()
    bytes_of[3] = value
    return bytes_of.view(tensor.dtype).view(tensor.shape)


FULL = torch.full
DAMAGES = {
    "truncated weights": (truncate("lobcq.safetensors", 0.7), r"cannot read .*lobcq\.safetensors"),
    "weights cut in the header": (truncate("lobcq.safetensors", 0.01), r"cannot read .*lobcq\.safetensors"),
    "empty weights": (truncate("lobcq.safetensors", 0), r"cannot read .*lobcq\.safetensors"),
    "truncated graph": (truncate("graph.json", 0.5), r"cannot read .*graph\.json"),
    "truncated config": (truncate("config.json", 0.5), r"cannot read .*config\.json"),
    "truncated inventory": (truncate("inventory.json", 0.5), r"cannot read .*inventory\.json"),
    "no weights": (lambda f: (f / "lobcq.safetensors").unlink(), r"lobcq\.safetensors"),
    "no graph": (lambda f: (f / "graph.json").unlink(), r"graph\.json is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "no inventory": (lambda f: (f / "inventory.json").unlink(), r"inventory\.json is missing"),
    "a list": (lambda f: (f / "graph.json").write_text("[]"), r"graph\.json does not hold a JSON object"),
    "no text": (lambda f: (f / "graph.json").write_bytes(b"\xff\xfe\x00"), r"cannot read .*graph\.json"),
    "missing tensor": (drop_tensor, r"lobcq\.safetensors lacks 2\.weight\.scales"),
    "codes of another dtype": (
        alter("0.weight.codes", lambda t: t.to(torch.int32)), r"0\.weight\.codes is torch.int32 .*has torch.uint8",
    ),
    "codes of another shape": (alter("0.weight.codes", lambda t: t[:, :-1]), r"0\.weight\.codes is .*\[64, 127\]"),
    "fewer rows": (alter("0.weight.scales", lambda t: t[:-1]), r"0\.weight\.scales is .*\[63, 2\]"),
    "flat selectors": (alter("0.weight.selectors", lambda t: t.flatten()), r"0\.weight\.selectors is"),
    "scalar codes": (alter("0.weight.codes", lambda t: t[0, 0]), "does not read what it should|0.weight.codes"),
    "scales as bytes": (alter("0.weight.scales", lambda t: t.view(torch.uint8)), r"0\.weight\.scales is torch.uint8"),
    "NaN scale": (alter("2.weight.scales", lambda t: put(t, 0x7F)), r"2\.weight\.scales holds NaN"),
    "negative scale": (alter("2.weight.scales", lambda t: put(t, 0x81)), r"2\.weight\.scales holds NaN or a neg"),
    "NaN tensor scale": (alter("0.weight.tensor_scale", lambda t: t * torch.nan), r"0\.weight\.tensor_scale is nan"),
    "tensor scale by row": (alter("0.weight.tensor_scale", lambda t: t.expand(64, 1)), r"0\.weight\.tensor_scale is"),
    "negative tensor scale": (alter("0.weight.tensor_scale", lambda t: -t), r"0\.weight\.tensor_scale is -"),
    "NaN static scale": (alter("2.activation_scale", lambda t: t * torch.nan), r"2\.activation_scale is .*positive"),
    "zero static scale": (alter("2.activation_scale", lambda t: t * 0), r"2\.activation_scale is .*positive"),
    "codebook out of range": (alter("lobcq.codebooks", lambda t: t * 0 + 32), r"lobcq\.codebooks: .*outside"),
    "codebook not sorted": (alter("lobcq.codebooks", lambda t: t.flip(1)), r"lobcq\.codebooks: .*sorted"),
    "more codebooks": (alter("lobcq.codebooks", lambda t: t.repeat(2, 1)), r"selectors is .*format 4x128"),
    "three codebooks": (alter("lobcq.codebooks", lambda t: t[[0, 0, 0]]), r"lobcq\.codebooks: "),
    "codebooks of another dtype": (alter("lobcq.codebooks", lambda t: t.to(torch.int16)), r"lobcq\.codebooks: "),
    "another version": (
        edit("config.json", lambda c: c["quantization_config"].update(format_version=3)),
        "has format version 3, this release reads 1 and 2: update",
    ),
    "another method": (
        edit("config.json", lambda c: c["quantization_config"].update(quant_method="gptq")),
        "not a quantized model",
    ),
    "unknown setting": (
        edit("config.json", lambda c: c["quantization_config"]["lobcq_config"].update(modes="w4a4")),
        "unknown setting 'modes'",
    ),
    "no nodes": (edit("graph.json", lambda c: c.pop("nodes")), "is damaged: KeyError: 'nodes'"),
    "nodes of another kind": (edit("graph.json", lambda c: c.update(nodes=7)), "is damaged"),
    "unknown operator": (
        edit("graph.json", lambda c: c["nodes"][-2].update(target="os.system")), "graph.json calls 'os.system'",
    ),
    "weight from an input": (
        edit("graph.json", lambda c: c.update(nodes=json.loads(json.dumps(c["nodes"]).replace(
            '"node": "layer_codes"', '"node": "x"').replace('"op": "get_attr"', '"op": "placeholder"').replace(".", "_")
        ))),
        "graph.json",
    ),
    "unknown call": (edit("graph.json", lambda c: c["calling"].update(kind="magic")), "calling convention 'magic'"),
    "no structure": (edit("graph.json", lambda c: c["calling"].pop("outputs")), "calling convention is damaged"),
    "damaged structure": (edit("graph.json", lambda c: c["calling"].update(inputs="[")), "call structure"),
    "inventory field": (edit("inventory.json", lambda c: c.pop("records")), "is damaged: KeyError: 'records'"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named(case, folder):
    """Also where the digests fit it."""
    damage, message = DAMAGES[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=rf"is not what was saved|{message}"):
        lobcq_fx.load(folder)
    with suppress(OSError, SafetensorError):  # a file is gone, or is none any more
        reindex(folder)
    with pytest.raises(CheckpointError, match=message):
        lobcq_fx.load(folder)


def test_files_and_missing_folders_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is no folder"):
        lobcq_fx.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is no folder"):
        lobcq_fx.load(folder / "config.json")


def test_saving_again_replaces_and_a_float_model_s_folder_is_refused(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    q = quantized("w4a4", tmp_path)
    q.save_pretrained(folder)
    assert lobcq_fx.load(folder).lobcq_config == LobcqConfig()
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert is_checkpoint(folder)
    foreign = tmp_path / "float"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    (foreign / "model.safetensors").write_text("gigabytes")
    assert not is_checkpoint(foreign)
    with pytest.raises(CheckpointError, match="holds files that are not a quantized model"):
        q.save_pretrained(foreign)
    assert (foreign / "model.safetensors").read_text() == "gigabytes"


@pytest.mark.parametrize("name", ["8x64", "2x128", "16x32"])
def test_size_on_disk_is_the_nominal_bits(name, tmp_path):
    spec = FormatSpec.from_name(name)
    layers = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(2)]).eval()
    q = lobcq_fx.quantize(layers, config=LobcqConfig(format=name, mode="w4a16"), example_inputs=values(2, 1024))
    q.save_pretrained(tmp_path / "q")
    nominal = 2 * 1024 * 1024 * spec.bits_per_scalar / 8
    assert (tmp_path / "q" / "lobcq.safetensors").stat().st_size == pytest.approx(nominal, rel=0.01)
    assert q.inventory.bits_per_scalar == pytest.approx(spec.bits_per_scalar, rel=0.001)
    assert q.inventory.model_packed_bytes == pytest.approx(nominal, rel=0.01)


PROCESS = """
import os, signal, sys, torch
from pathlib import Path
import lobcq_fx
from lobcq_fx.storage import checkpoint

folder = Path(sys.argv[1])
q = lobcq_fx.load(folder)
torch.save(q(torch.ones(2, 172)), folder.parent / "out.pt")
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.load_checkpoint = die
q.save_pretrained(folder)
"""


def test_a_fresh_process_loads_the_same_and_its_death_while_saving_harms_nothing(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = subprocess.run([sys.executable, "-c", PROCESS, folder], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    outputs = torch.load(folder.parent / "out.pt")
    assert torch.equal(outputs, lobcq_fx.load(folder)(torch.ones(2, 172)))


@pytest.fixture(scope="module")
def saved_lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "lm"
    quantized_causal_lm("llama")[1].save_pretrained(folder)
    return folder


def change_graph(folder, change):
    saved = json.loads((folder / "graph.json").read_text())
    change(saved)
    (folder / "graph.json").write_text(json.dumps(saved))
    reindex(folder)


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cpu", "auto", torch.device("cpu"), {"": "cpu"}])
def test_a_device_map(folder, device_map):
    """`auto` is the CPU here, or what a GPU gives."""
    q = lobcq_fx.load(folder, device_map=device_map)
    assert q.device.type == ("cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu")
    assert lobcq_fx.load(folder, device_map="meta").device.type == "meta"


@pytest.mark.parametrize("device_map", ["nowhere", {}, {"model.layers.0": "cpu", "model.layers.1": "meta"}])
def test_a_device_map_of_something_else(folder, device_map):
    with pytest.raises(ConfigError, match=r"device_map=.*a graph is on one device.*Remedy"):
        lobcq_fx.load(folder, device_map=device_map)


def test_both_graphs_of_a_language_model_are_loaded(saved_lm, tmp_path):
    q, loaded = quantized_causal_lm("llama")[1], lobcq_fx.load(saved_lm)
    ids = torch.arange(3, 9).view(1, 6)
    for step in (ids, ids[:, :2], ids[:, :1]):
        caches = [one.static_cache(12, batch_size=1) for one in (q, loaded)]
        assert torch.equal(q(step, past_key_values=caches[0]).logits, loaded(step, past_key_values=caches[1]).logits)
        assert torch.equal(caches[0].layers[1].values, caches[1].layers[1].values)
    ours, theirs = (one.graphs["static_cache"] for one in (q, loaded))
    assert str(theirs.stored) == str(ours.stored)
    assert theirs.calling == ours.calling
    assert set(load_file(saved_lm / "lobcq.safetensors")) == set(q.state_dict())
    loaded.save_pretrained(tmp_path / "again")
    for name in ("lobcq.safetensors", "graph.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved_lm / name).read_bytes()


@torch.no_grad()
def test_a_folder_without_the_second_graph_refuses_static_caches(saved_lm, tmp_path):
    shutil.copytree(saved_lm, tmp_path / "old")
    change_graph(tmp_path / "old", lambda saved: saved.pop("variants"))
    old, ids = lobcq_fx.load(tmp_path / "old"), torch.arange(3, 9).view(1, 6)
    assert torch.equal(old(ids).logits, quantized_causal_lm("llama")[1](ids).logits)
    with pytest.raises(CallError, match=r"saved by a release that knew none.* quantize the float model again"):
        old(ids, past_key_values=old.static_cache(9))


def test_a_graph_of_an_unknown_kind_is_left_out(saved_lm, tmp_path):
    shutil.copytree(saved_lm, tmp_path / "newer")

    def rename(saved):
        saved["variants"]["another"] = saved["variants"].pop("static_cache")
        saved["variants"]["another"]["calling"]["kind"] = "another"

    change_graph(tmp_path / "newer", rename)
    assert list(lobcq_fx.load(tmp_path / "newer").graphs) == ["main"]


def no_nodes(saved):
    del saved["variants"]["static_cache"]["nodes"]


def other_columns(saved):
    nodes = saved["variants"]["static_cache"]["nodes"]
    linear = next(node for node in nodes if node["target"] == "ops.lobcq.linear.default")
    linear["args"]["tuple"][-3] -= 8


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_nodes, "is damaged: KeyError"),
        (lambda saved: saved.update(variants=[]), "is damaged: AttributeError"),
        (lambda saved: saved["variants"]["static_cache"].update(calling={}), "the calling convention is damaged"),
        (other_columns, r"q_proj\.weight is read as .* 64\) and as .* 72\)"),
    ],
)
def test_damage_to_the_second_graph_is_named(saved_lm, tmp_path, damage, message):
    shutil.copytree(saved_lm, tmp_path / "q")
    change_graph(tmp_path / "q", damage)
    with pytest.raises(CheckpointError, match=message):
        lobcq_fx.load(tmp_path / "q")
