"""Vision-language models with images, against the fake-quantized original: tokens, logits, caches, saved and loaded."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import transformers

import lobcq_fx
from lobcq_fx.errors import CallError
from lobcq_fx.frontends.vision_language_call import ImagesCall, VisionCall
from tests.families import VOCABULARY, fake_quantized, quantized_layers
from tests.more_families import agreement, linears_that_run
from tests.vision_language import IMAGE, VISION_LANGUAGE, of_linears

IN_DEPTH = ("llava", "qwen2_5_vl")
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "two answers": {"do_sample": True, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}


class Pair:
    """A family's float model, whose linears are called as they are named, its quantized model, and a call."""

    def __init__(self, name):
        self.family = VISION_LANGUAGE[name]
        self.model = self.family.model()
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=VOCABULARY + 1)
        self.q = lobcq_fx.quantize(self.model, static_cache=name in IN_DEPTH)
        of_linears(self.model)
        self.call = self.family.call(self.model)

    def fake(self, mode="w4a4"):
        return fake_quantized(self.model, quantized_layers(self.q), mode=mode, exact=True)


@pytest.fixture(scope="module", params=IN_DEPTH)
def pair(request):
    return Pair(request.param)


@pytest.fixture(scope="module")
def llava():
    return Pair("llava")


def generated(model, call, **settings):
    torch.manual_seed(1)
    return model.generate(**deepcopy(call), max_new_tokens=6, **settings)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_fake_quantized_model(pair, way):
    with pair.fake():
        expected = generated(pair.model, pair.call, **WAYS[way])
    assert len(set(expected[:, -6:].flatten().tolist())) > 4
    assert torch.equal(generated(pair.q, pair.call, **WAYS[way]), expected)
