"""Vision-language models with images, against the fake-quantized original: tokens, logits, caches, saved and loaded."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from itertools import product

import pytest
import torch
import transformers

import lobcq_fx
from lobcq_fx.errors import CallError
from lobcq_fx.format import absmax_row_scale
from lobcq_fx.frontends.vision_language_call import ImagesCall, VisionCall
from tests.families import VOCABULARY, fake_quantized, quantized_layers
from tests.more_families import agreement, linears_that_run, noise
from tests.vision_language import IMAGE, VISION_LANGUAGE, VisionLanguage, of_linears

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
        self.q = lobcq_fx.quantize(self.model, static_cache=name == "llava")
        of_linears(self.model)
        self.call = self.family.call(self.model)

    def fake(self, mode="w4a4"):
        return fake_quantized(self.model, quantized_layers(self.q), mode=mode, exact=True)


@cache
def pair_of(name):
    return Pair(name)


@pytest.fixture(scope="module", params=IN_DEPTH)
def pair(request):
    return pair_of(request.param)


@pytest.fixture(scope="module")
def llava():
    return pair_of("llava")


def generated(model, call, **settings):
    torch.manual_seed(1)
    return model.generate(**deepcopy(call), max_new_tokens=6, **settings)


@pytest.mark.parametrize(("name", "way"), [*product(["llava"], WAYS), *product(["qwen2_5_vl"], list(WAYS)[:-1])])
def test_tokens_are_those_of_the_fake_quantized_model(name, way):
    pair = pair_of(name)
    with pair.fake():
        expected = generated(pair.model, pair.call, **WAYS[way])
    assert len(set(expected[:, -6:].flatten().tolist())) > 4
    assert torch.equal(generated(pair.q, pair.call, **WAYS[way]), expected)


@torch.no_grad()
def test_logits_and_loss_are_those_of_the_fake_quantized_model(pair):
    labels = pair.call["input_ids"].masked_fill(pair.call["input_ids"] == IMAGE, -100)
    with pair.fake():
        expected = pair.model(**pair.call, labels=labels)
    actual = pair.q(**pair.call, labels=labels)
    real = pair.call["attention_mask"].bool()
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual.logits[real], expected.logits[real])
    torch.testing.assert_close(actual.loss, expected.loss)
    if "image_hidden_states" in expected:
        torch.testing.assert_close(actual.image_hidden_states, expected.image_hidden_states)
    assert not torch.allclose(pair.q(**text_of(pair.call)).logits[real], actual.logits[real])  # images count


@torch.no_grad()
def test_text_alone_is_served_as_by_any_language_model(pair):
    text = text_of(pair.call)
    with pair.fake():
        expected = generated(pair.model, text)
    assert torch.equal(generated(pair.q, text), expected)


def test_a_second_turn_brings_images_of_its_own(pair):
    """Its tokens stand behind the cache of the first, whose last token the model has not read yet."""
    turns = []
    for model in (pair.model, pair.q):
        with pair.fake():
            cache = transformers.DynamicCache()
            first = generated(model, pair.call, past_key_values=cache)
            ids, mask = (torch.cat((first, pair.call["input_ids"]), dim=1), torch.ones_like(first))
            mask[:, : pair.call["attention_mask"].shape[1]] = pair.call["attention_mask"]
            call = pair.call | {
                "input_ids": ids,
                "attention_mask": torch.cat((mask, pair.call["attention_mask"]), dim=1),
            }
            turns.append(generated(model, call, past_key_values=cache))
    assert torch.equal(*turns)


@torch.no_grad()
def test_saved_and_loaded_models_give_the_same_and_the_inventory_has_the_vision_tower(pair, tmp_path):
    pair.q.save_pretrained(tmp_path / "q")
    loaded = lobcq_fx.load(tmp_path / "q")
    assert type(loaded) is type(pair.q)
    assert torch.equal(loaded(**pair.call).logits, pair.q(**pair.call).logits)
    of_images = [
        name for name in quantized_layers(pair.q) if "vision" in name or "visual" in name or "projector" in name
    ]
    assert len(of_images) > 6
    assert set(of_images) <= linears_that_run(pair.family, pair.model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["paligemma", "idefics3", "qwen3_vl"])  # `make families` has the others too
def test_a_family_computes_what_its_fake_quantized_original_does(name, tmp_path):
    pair = Pair(name)
    found = agreement(pair.family, pair.model, pair.q)
    assert found.median < 1e-5
    assert found.beyond < 0.1
    assert found.effect > 1e-3
    assert set(quantized_layers(pair.q)) <= linears_that_run(pair.family, pair.model)
    with pair.fake():
        expected = generated(pair.model, pair.call, num_beams=2)
    assert torch.equal(generated(pair.q, pair.call, num_beams=2), expected)
    pair.q.save_pretrained(tmp_path / "q")
    loaded = lobcq_fx.load(tmp_path / "q")
    assert torch.equal(generated(loaded, pair.call, num_beams=2), expected)


@torch.no_grad()
def test_the_vision_graph_compiles_whole_for_any_number_of_images(llava):
    graph = llava.q.graphs[VisionCall.kind]
    torch._dynamo.reset()
    compiled = torch.compile(graph.graph_module, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (3, 2):
        inputs = graph.calling.flatten((), {"pixel_values": noise(count, 3, 16, 16), "device": llava.q.device})
        torch.testing.assert_close(compiled(*inputs), graph.graph_module(*inputs))


@torch.no_grad()
def test_static_scales_are_of_the_images_that_it_was_calibrated_with(llava):
    config = lobcq_fx.LobcqConfig(activation_scale="static", include=["*projector*", "*gate_proj"])
    batches = [llava.call, text_of(llava.call)]
    q = lobcq_fx.quantize(llava.model, batches, config, static_cache=False)
    seen = []
    layer = llava.model.get_submodule("model.multi_modal_projector.linear_2")
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    llava.model(**llava.call)
    hook.remove()
    (scale,) = (one for name, one in q.named_buffers() if "linear_2" in name and "activation_scale" in name)
    largest = absmax_row_scale(seen[0].reshape(1, -1))
    assert len(seen) == 1
    torch.testing.assert_close(scale.flatten(), largest.flatten())


def test_a_quantized_cache_takes_images(llava):
    with llava.fake():
        expected = generated(llava.model, llava.call, past_key_values=lobcq_fx.LobcqCache())
    assert torch.equal(generated(llava.q, llava.call, past_key_values=lobcq_fx.LobcqCache()), expected)


REFUSALS = {
    "a video": (lambda q, call: q(**call, pixel_values_videos=torch.zeros(1)), "videos are not served: pass single"),
    "another size": (
        lambda q, call: q(**call | {"pixel_values": torch.zeros(3, 3, 16, 8)}),
        r"pixel_values is a torch.float32 of \[3, 3, 16, 8\]: pass a float tensor \[any, 3, 16, 16\]",
    ),
    "an image too few": (
        lambda q, call: q(**call | {"pixel_values": torch.zeros(2, 3, 16, 16)}),
        "another number of features than input_ids has image tokens",
    ),
    "an image too few for beams": (
        lambda q, call: q.generate(**call | {"pixel_values": torch.zeros(2, 3, 16, 16)}, num_beams=2),
        "another number of features than input_ids has image tokens",
    ),
    "grids": (lambda q, call: q(**call, image_grid_thw=torch.ones(3, 3)), "'image_grid_thw' is not supported"),
    "token types": (lambda q, call: q(**call, token_type_ids=call["input_ids"]), "token_type_ids is not supported"),
    "sizes": (lambda q, call: q(**call, image_sizes=torch.ones(3, 2)), "'image_sizes' is not supported"),
    "a quantized static cache": (
        lambda q, call: q(**call, past_key_values=q.static_cache(40, kv_cache="8x64")),
        "a LobcqStaticCache takes no images: pass a LobcqCache",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_served_is_refused_by_name(llava, case):
    call, message = REFUSALS[case]
    with pytest.raises(CallError, match=message), torch.no_grad():
        call(llava.q, llava.call)


@torch.no_grad()
def test_a_model_whose_images_are_not_served_serves_text_and_says_so(tmp_path):
    """LLaVA-NeXT wants the images' sizes beside pixels."""
    family = VisionLanguage("llava_next", VISION_LANGUAGE["llava"].changes)
    model = family.model()
    text = text_of(family.call(model))
    q = family.quantized(model)
    q.save_pretrained(tmp_path / "q")
    for one in (q, lobcq_fx.load(tmp_path / "q")):
        assert list(one.graphs) == ["main"]
        with fake_quantized(model, quantized_layers(q), exact=True):
            torch.testing.assert_close(one(**text).logits, model(**text).logits)
        with pytest.raises(CallError, match=r"serves text alone: .*LlavaNextFor.* takes images by image_sizes"):
            one(**text, pixel_values=torch.zeros(1, 5, 3, 16, 16))
        with pytest.raises(ValueError, match="pixel_values"):
            one.generate(**text, pixel_values=torch.zeros(1, 5, 3, 16, 16), max_new_tokens=2)


DAMAGES = {
    VisionCall.kind: {"images": "sound", "dtype": "load", "results": 0, "guards": [["==", ["size", 1, 0], 2]]},
    ImagesCall.kind: {"inputs": ["input_ids"], "token_type": 7, "guards": [["==", ["size", 9, 0], 2]]},
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, one in DAMAGES.items() for name in one])
def test_damaged_calling_conventions_are_refused(llava, kind, name):
    calling, causal = llava.q.graphs[kind].calling, llava.q.calling
    values = calling.to_dict()

    def read(given):
        if kind == VisionCall.kind:
            return VisionCall.from_dict(given, llava.q.config)
        return ImagesCall.beside(given, causal, calling.vision)

    assert read(values).to_dict() == values
    with pytest.raises(ValueError, match=r"images are|the vision graph has|inputs are|size guard"):
        read({**values, name: DAMAGES[kind][name]})


def text_of(call):
    ids = call["input_ids"].where(call["input_ids"] != IMAGE, 7)
    return {"input_ids": ids, "attention_mask": call["attention_mask"]}
