"""quantize_folder with calibration data: byte for byte what quantizing in memory saves, and nothing is done twice."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import fx

import lobcq_fx
from lobcq_fx import LobcqConfig
from lobcq_fx.errors import CalibrationError, CheckpointError
from lobcq_fx.frontends import front_end_of
from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.observation import Observation
from lobcq_fx.pipeline import make_plan
from lobcq_fx.storage.atomic_folder import unfinished
from lobcq_fx.streaming import calibrated, skeleton
from lobcq_fx.streaming.spilled import SpilledValues
from lobcq_fx.tracing.trace import MAIN
from tests.families import ONE_LAYER
from tests.fuzz.streaming import contents
from tests.streaming.float_models import save_float_model

pytestmark = pytest.mark.usefixtures("traced_once")

MODELS = {
    "llama": lambda: transformers.LlamaConfig(**{**ONE_LAYER, "num_hidden_layers": 3}),
    "mixtral": lambda: transformers.MixtralConfig(**ONE_LAYER, num_local_experts=3),
    "qwen2-tied": lambda: transformers.Qwen2Config(**ONE_LAYER, tie_word_embeddings=True),
}
CASES = {
    "best": ("llama", LobcqConfig.of_recipe("best"), None),
    "best, on the disk": ("llama", LobcqConfig.of_recipe("best", mode="w4a8"), 1000),
    "experts": ("mixtral", LobcqConfig.of_recipe("best"), 1000),
    # Equal scales are one in the graph; of head and embedding, which are one, the embedding stays in float.
    "static": ("qwen2-tied", LobcqConfig(activation_scale="static", exclude=()), 1000),
}


SETTINGS: dict[str, Any] = {"config": LobcqConfig.of_recipe("best"), "static_cache": False, "max_memory": 1000}


@pytest.fixture(scope="module", autouse=True)
def _all_stand_ins() -> Iterator[None]:
    """As tensors of real sizes are: none but norms and biases is read before its segment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skeleton, "SMALL", 1024)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float models by name, in several files."""
    root = tmp_path_factory.mktemp("float")
    for name, config in MODELS.items():
        save_float_model(config(), root / name, max_shard_size="40KB")
    return root


def data(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 60, (2, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


@pytest.mark.parametrize("case", CASES)
def test_the_folder_is_that_of_the_model_in_memory(folders: Path, tmp_path: Path, case: str) -> None:
    name, config, max_memory = CASES[case]
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / name).eval()
    q = lobcq_fx.quantize(model, data(), config, static_cache=False)
    q.save_pretrained(tmp_path / "memory")
    found = lobcq_fx.quantize_folder(
        folders / name, tmp_path / "streamed", config, calibration_data=data(), static_cache=False,
        max_memory=max_memory,
    )  # fmt: skip
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")
    assert found.records == q.inventory.records
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def test_a_segment_s_weights_are_in_memory_and_no_others(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: list[int] = []
    piece = calibrated.Calibration._piece

    def looking(self: calibrated.Calibration, *arguments: Any) -> calibrated.Piece:
        outline = self._outline
        weights = [get_attribute(outline.root, one.source) for one in outline.plan.weights]
        real.append(sum(outline.skeleton.stands_in(one) is None for one in weights))
        return piece(self, *arguments)

    monkeypatch.setattr(calibrated.Calibration, "_piece", looking)
    config = LobcqConfig(rounding="compensated")
    settings = {"calibration_data": data(), "static_cache": False, "max_memory": 1000}
    lobcq_fx.quantize_folder(folders / "llama", tmp_path / "q", config, **settings)
    assert sum(real) == 3 * 7
    assert max(real) < 7


def failing_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the disk be full once some segments are stored; the segments that are encoded."""
    store, begun = calibrated._store, list[int]()

    def failing(path: Path, tensors: Any) -> None:
        begun.append(int(path.stem))
        if len(begun) > count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        store(path, tensors)

    monkeypatch.setattr(calibrated, "_store", failing)
    return begun


@pytest.fixture(scope="module")
def begun(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a folder would be whose making failed after two segments."""
    target = tmp_path_factory.mktemp("begun") / "q"
    with pytest.MonkeyPatch.context() as patch:
        failing_after(2, patch)
        with pytest.raises(OSError, match="No space left on device"):
            lobcq_fx.quantize_folder(folders / "llama", target, calibration_data=data(), **SETTINGS)
    return target


@pytest.fixture
def interrupted(begun: Path, tmp_path: Path) -> Path:
    """A copy."""
    shutil.copytree(unfinished(begun), unfinished(tmp_path / "q"))
    return tmp_path / "q"


@pytest.fixture(scope="module")
def at_once(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the folder holds that nothing interrupts."""
    target = tmp_path_factory.mktemp("at_once") / "q"
    lobcq_fx.quantize_folder(folders / "llama", target, calibration_data=data(), **SETTINGS)
    return contents(target)


def damage_last(target: Path) -> None:
    (unfinished(target) / "segments" / "1.safetensors").write_bytes(b"")


@pytest.mark.parametrize(("change", "first"), [(lambda target: None, 2), (damage_last, 1)], ids=["whole", "damaged"])
def test_the_next_call_encodes_the_rest(
    folders: Path,
    at_once: dict[str, bytes],
    interrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    first: int,
) -> None:
    change(interrupted)
    encoded = failing_after(1000, monkeypatch)
    lobcq_fx.quantize_folder(folders / "llama", interrupted, calibration_data=data(), **SETTINGS)
    assert encoded[0] == first
    assert contents(interrupted) == at_once
    assert not unfinished(interrupted).exists()


@pytest.mark.parametrize("change", ["calibration data", "memory for segments"])
def test_work_on_other_data_is_not_mixed_with_it(folders: Path, interrupted: Path, change: str) -> None:
    given = {**SETTINGS, "calibration_data": data(2 if change == "calibration data" else 3)}
    if change != "calibration data":
        given["max_memory"] = None
    with pytest.raises(CheckpointError, match=rf"was begun with other {change}, and stays"):
        lobcq_fx.quantize_folder(folders / "llama", interrupted, **given)
    assert unfinished(interrupted).exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LobcqConfig(bits=4.5), "a budget of bits need all layers at once"),
        (LobcqConfig(codebooks="fitted"), "fitted codebooks need all layers at once"),
    ],
)
def test_what_looks_at_all_layers_first_is_refused(
    folders: Path, tmp_path: Path, config: LobcqConfig, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        lobcq_fx.quantize_folder(folders / "llama", tmp_path / "q", config, calibration_data=data())


def test_values_beyond_the_bound_are_in_files(tmp_path: Path) -> None:
    values = SpilledValues(tmp_path / "values", limit=3 * 400)
    for number in range(5):
        values.append({"x": torch.full((1000,), float(number))[:100], "n": number})
    kept = [one["x"].untyped_storage().nbytes() for one in values._kept if one is not None]
    assert kept == [400] * 3  # not the 1000 that they are a part of
    assert len(list((tmp_path / "values").iterdir())) == 2
    values[4] = {"x": torch.zeros(0)}
    values[0] = {"y": torch.ones(200)}
    assert [sorted(one) for one in values] == [["y"], ["n", "x"], ["n", "x"], ["n", "x"], ["x"]]
    assert float(values[3]["x"].sum()) == 300
    assert len(list((tmp_path / "values").iterdir())) == 1 + 1


def test_segments_end_where_little_is_alive_besides_the_hidden_state(folders: Path) -> None:
    """The mask, and the cosines and sines of all positions."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama").eval()
    traced = front_end_of(model).trace(model, None, static_cache=False)
    plan, _ = make_plan(traced.graph_modules, LobcqConfig(rounding="compensated"))
    main = traced.graph_modules[MAIN]
    size = sum(one.nbytes for one in model.model.layers[0].parameters())
    found = Observation(main, plan, limit=size).segments
    assert len(found) == 4
    wides = {node.name for node in main.graph.nodes if wide(node)}
    assert [sum(name in wides for name in one.carried) for one in found] == [1, 1, 1, 0]


def wide(node: fx.Node) -> bool:
    """Whether a value is at least as large as the hidden state, and made by the graph."""
    value = node.meta.get("val")
    return node.op != "placeholder" and isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[-1] >= 72
