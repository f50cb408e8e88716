"""quantize_folder: byte for byte what quantizing in memory saves, for every way in which a checkpoint can lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import fx

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.errors import CalibrationError, CheckpointError, NotStreamedError
from lobcq_fx.storage.atomic_folder import unfinished
from lobcq_fx.streaming import skeleton
from lobcq_fx.streaming.emission import _check_tensors
from lobcq_fx.streaming.float_folder import FloatFolder
from tests.families import ONE_LAYER, TOKENS
from tests.fuzz.streaming import contents
from tests.streaming.float_models import save_float_model

CONFIGS = {
    # Of head and embedding, which are one, the files have the embedding.
    "qwen2-tied": lambda: transformers.Qwen2Config(**ONE_LAYER, tie_word_embeddings=True),
    "gpt2-transposed": lambda: transformers.GPT2Config(n_embd=72, n_layer=1, n_head=4, n_positions=64, **TOKENS),
    # Its files have each expert's weights alone, which transformers stacks.
    "mixtral-experts": lambda: transformers.MixtralConfig(**ONE_LAYER, num_local_experts=3),
}
DTYPES = {"qwen2-tied": "bfloat16", "gpt2-transposed": "float16"}
SETTINGS = {"qwen2-tied": LobcqConfig(exclude=()), "gpt2-transposed": LobcqConfig(mode="w4a16", format="16x64")}
"""With nothing excluded the tied head is packed, and the embedding stays in float."""
MAX_SHARD_SIZES = {"gpt2-transposed": "10KB", "mixtral-experts": 5000}
"""Less than the largest tensors have; in one file where there is none."""


@pytest.fixture(autouse=True)
def _all_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tensors of real sizes are: none but norms and biases is read before it is encoded."""
    monkeypatch.setattr(skeleton, "SMALL", 1024)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float models by name, most in several files."""
    root = tmp_path_factory.mktemp("float")
    for name, config in CONFIGS.items():
        dtype = getattr(torch, DTYPES.get(name, "float32"))
        size = "5GB" if name == "gpt2-transposed" else "40KB"
        save_float_model(config(), root / name, dtype=dtype, max_shard_size=size)
    return root


def in_memory(
    folder: Path, output: Path, config: LobcqConfig | None = None, max_shard_size: int | str | None = None
) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    lobcq_fx.quantize(model, config=config, static_cache=False).save_pretrained(output, max_shard_size=max_shard_size)
    return output


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folder_is_that_of_the_model_in_memory(folders: Path, tmp_path: Path, name: str) -> None:
    config, size = SETTINGS.get(name), MAX_SHARD_SIZES.get(name)
    expected = in_memory(folders / name, tmp_path / "memory", config, size)
    found = lobcq_fx.quantize_folder(
        folders / name, tmp_path / "streamed", config, static_cache=False, max_shard_size=size
    )
    files = [file.stat().st_size for file in expected.glob("*.safetensors")]
    assert size is None or (len(files) > 3 and max(files) > 15_000)
    assert contents(tmp_path / "streamed") == contents(expected)
    assert found.quantized
    assert json.loads(json.dumps(found.to_dict())) == json.loads((expected / "inventory.json").read_text())
    assert not unfinished(tmp_path / "streamed").exists()


def tied_differently(folder: Path, copy: Path, change: float) -> Path:
    """A tied model whose file has the head too, with another value in one place."""
    shutil.copytree(folder, copy)
    (copy / "model.safetensors.index.json").unlink()
    tensors = {name: one for file in sorted(copy.glob("*.safetensors")) for name, one in load_file(file).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][3, 5] += change
    for file in copy.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_weights_are_tied_where_the_files_have_them_equal(folders: Path, tmp_path: Path, change: float) -> None:
    copy = tied_differently(folders / "qwen2-tied", tmp_path / "copy", change)
    model = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype="auto")
    bone = skeleton.Skeleton.of(FloatFolder(copy), "auto")
    for one in (model, bone.model):
        assert (one.lm_head.weight is one.model.embed_tokens.weight) == (change == 0)


def test_a_skeleton_has_no_memory_but_that_of_its_largest_weight(folders: Path) -> None:
    source = FloatFolder(folders / "mixtral-experts")
    bone = skeleton.Skeleton.of(source, "auto")
    weights = [one for one in bone.model.parameters() if one.nbytes > skeleton.SMALL]
    assert len(weights) == 8
    assert len({one.untyped_storage().data_ptr() for one in weights}) == 1
    assert len({one.data_ptr() for one in weights}) == 8
    assert all(bool(one.isfinite().all()) for one in weights)


def test_what_cannot_be_read_tensor_by_tensor_is_refused_before_any_work(folders: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders / "gpt2-transposed", copy)
    with pytest.raises(CalibrationError, match=r"leave out rounding='compensated', smoothing='folded'"):
        lobcq_fx.quantize_folder(copy, tmp_path / "q", recipe="balanced")
    with pytest.raises(CheckpointError, match="choose a folder outside of it"):
        lobcq_fx.quantize_folder(copy, copy / "q")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"but pytorch_model.bin: only safetensors are read .* load the model, and"
    ):
        lobcq_fx.quantize_folder(copy, tmp_path / "q")
    assert [one.name for one in tmp_path.iterdir()] == ["copy"]


def test_a_folder_that_lacks_a_parameter_has_to_be_read_whole(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "gpt2-transposed", tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotStreamedError, match=r"has no transformer.ln_f.weight, which transformers makes up"):
        lobcq_fx.quantize_folder(tmp_path / "copy", tmp_path / "q")


@pytest.mark.parametrize("damage", ["cut", "gone", "no_header"])
def test_a_damaged_shard_is_named(folders: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(folders / "mixtral-experts", tmp_path / "copy")
    shard = sorted((tmp_path / "copy").glob("*.safetensors"))[2]
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: -1 if damage == "cut" else 5])
    with pytest.raises(CheckpointError, match=rf"{shard.name} (is not whole, copy|is missing)"):
        lobcq_fx.quantize_folder(tmp_path / "copy", tmp_path / "q")


@pytest.mark.parametrize("exclude", [(), ("*patch_embeddings*",)], ids=["packed", "in float"])
def test_a_patch_embedding_is_the_matrix_of_its_convolution(tmp_path: Path, exclude: tuple[str, ...]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(
        tmp_path / "float"
    )
    model = transformers.ViTModel.from_pretrained(tmp_path / "float").eval()
    config, image = LobcqConfig(exclude=exclude), {"pixel_values": torch.randn(1, 3, 16, 16)}
    lobcq_fx.quantize_folder(tmp_path / "float", tmp_path / "streamed", config, image)
    lobcq_fx.quantize(model, config=config, example_inputs=image).save_pretrained(tmp_path / "memory")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")


@pytest.mark.parametrize("look", [lambda weight: weight.t(), lambda weight: weight[:2]], ids=["transposed", "a part"])
def test_what_looks_at_a_weight_otherwise_is_refused(
    folders: Path, look: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    bone = skeleton.Skeleton.of(FloatFolder(folders / "qwen2-tied"), "auto")
    weight = bone.model.model.layers[0].mlp.up_proj.weight
    root = fx.GraphModule({}, fx.Graph())
    root.register_parameter("weight", torch.nn.Parameter(look(weight.detach()), requires_grad=False))
    with pytest.raises(NotStreamedError, match=r"weight is a part of model\.layers\.0\.mlp\.up_proj\.weight, or has"):
        _check_tensors(root, bone)
