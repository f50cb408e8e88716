"""Who else opens saved folders: transformers, which must refuse them, and this package those of older releases."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lobcq_fx
from lobcq_fx.storage.checkpoint import NOTICE

# causal_lm and encoder as 0.1.0 saved them (tiny, 2x64, with a graph for static caches), and what they gave there.
RELEASE_0_1 = Path(__file__).with_name("release_0_1.tar.gz")
KINDS = ("causal_lm", "encoder")

LOADERS = {"causal_lm": ("AutoModelForCausalLM", "LlamaForCausalLM"), "encoder": ("AutoModelForMaskedLM", "BertModel")}

PROCESS = """
import sys
import transformers

print(transformers.AutoConfig.from_pretrained(sys.argv[1]).model_type)
for name in sys.argv[2:]:
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1])
    except Exception as error:
        print(" ".join(str(error).split()))
    else:
        print("opened")
assert "lobcq_fx" not in sys.modules
"""


@pytest.fixture(scope="module")
def release_0_1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release_0_1")
    with tarfile.open(RELEASE_0_1) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def resaved(release_0_1, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resaved")
    for kind in KINDS:
        lobcq_fx.load(release_0_1 / kind).save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_refuses_a_saved_model_and_says_what_opens_it(resaved, kind):
    loaders = ("AutoModel", *LOADERS[kind])
    command = [sys.executable, "-c", PROCESS, str(resaved / kind), *loaders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    model_type, *errors = done.stdout.splitlines()
    assert model_type == {"causal_lm": "llama", "encoder": "bert"}[kind]
    assert len(errors) == len(loaders)
    assert all(error.endswith(NOTICE) for error in errors), errors


def test_neither_does_a_reader_find_a_float_model_s_weights(resaved):
    for kind in KINDS:
        names = {file.name for file in (resaved / kind).glob("*.safetensors*")}
        assert names == {"lobcq.safetensors"}


@torch.no_grad()
@pytest.mark.parametrize("again", [False, True], ids=["as it was saved", "saved again"])
def test_folders_of_0_1_give_what_they_gave(release_0_1, resaved, again):
    folder = resaved if again else release_0_1
    expected = json.loads((release_0_1 / "expected.json").read_text())
    ids = torch.tensor(expected["input_ids"])
    q, encoder = (lobcq_fx.load(folder / kind) for kind in KINDS)
    for cache in (transformers.DynamicCache(), q.static_cache(8)):
        logits = q(ids, past_key_values=cache).logits[0, -1]
        torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)
    assert q.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0].tolist() == expected["tokens"]
    pooled = encoder(input_ids=ids).pooler_output[0]
    torch.testing.assert_close(pooled, torch.tensor(expected["pooled"]), rtol=1e-4, atol=1e-4)


def test_a_folder_of_0_1_is_written_anew_with_the_same_tensors(release_0_1, resaved):
    for kind in KINDS:
        old = load_file(release_0_1 / kind / "model.safetensors")
        new = load_file(resaved / kind / "lobcq.safetensors")
        assert set(new) == set(old)
        for name, tensor in old.items():
            assert torch.equal(new[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
        versions = [
            json.loads((folder / kind / "config.json").read_text())["quantization_config"]["format_version"]
            for folder in (release_0_1, resaved)
        ]
        assert versions == [1, 2]


def test_the_notice_is_no_setting_of_the_model(resaved):
    q = lobcq_fx.load(resaved / "causal_lm")
    assert NOTICE not in str(q.config)
    assert transformers.AutoConfig.from_pretrained(resaved / "causal_lm").hidden_size == q.config.hidden_size == 32
