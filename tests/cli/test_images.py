"""The commands on a vision-language model, with the processor that it is saved with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import lobcq_fx
from tests.cli.conftest import Run

SIDE, PATCH = 16, 8
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} sees {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %} . {% endfor %}"
    "{% if add_generation_prompt %}A {% endif %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=SIDE, patch_size=PATCH),
        text_config=LlamaConfig(**sizes, **text, num_hidden_layers=1, initializer_range=0.2),
        image_token_id=processor.image_token_id,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "llava"
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized_llava(lobcq: Run, llava: Path) -> Path:
    folder = llava.parent / "llava-4bit"
    shown = lobcq("quantize", llava, "-o", folder)
    assert "the whole model is loaded" not in shown.stderr
    assert "lobcq eval" not in shown.stderr + shown.stdout
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    files = [tmp_path_factory.mktemp("images") / name for name in ("a.png", "b.png")]
    Image.linear_gradient("L").save(files[0])
    Image.radial_gradient("L").resize((40, 24)).save(files[1])
    return files


def test_a_folder_is_saved_with_its_processor(llava: Path, quantized_llava: Path, images: list[Path]) -> None:
    one, other = (AutoProcessor.from_pretrained(folder) for folder in (llava, quantized_llava))
    assert other.chat_template == TEMPLATE
    image, text = Image.open(images[0]).convert("RGB"), "<image> A dog"
    for name, value in one(images=image, text=text, return_tensors="pt").items():
        assert torch.equal(other(images=image, text=text, return_tensors="pt")[name], value)


@pytest.mark.parametrize(
    ("count", "chat", "rendered"),
    [
        (0, True, "user sees the ball . A "),
        (1, True, "user sees <image>the ball . A "),
        (2, True, "user sees <image><image>the ball . A "),
        (1, False, "the ball <image> sees"),
        (0, False, "the ball"),
    ],
)
def test_tokens_are_those_of_what_the_processor_returns(
    lobcq: Run, quantized_llava: Path, images: list[Path], count: int, chat: bool, rendered: str
) -> None:
    processor, shown = AutoProcessor.from_pretrained(quantized_llava), images[:count]
    given = {"images": [Image.open(file).convert("RGB") for file in shown]} if shown else {}
    inputs = processor(**given, text=rendered, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    model = lobcq_fx.load(quantized_llava)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, length:]
    options = [word for file in shown for word in ("--image", file)]
    prompt = ("-p", "the ball") if chat else ("--no-chat", "-p", rendered)
    found = lobcq.json("generate", quantized_llava, *options, *prompt, "--max-new-tokens", 8)
    assert found["tokens"] == expected.tolist()
    assert found["text"] == processor.decode(expected, skip_special_tokens=True)
    assert found["images"] == [str(file) for file in shown]
    assert (found["prompt_tokens"], found["chat"]) == (length, chat)


def test_what_is_shown_counts(lobcq: Run, llava: Path, images: list[Path]) -> None:
    """In another order, and other images, they are answered otherwise; by a float model too."""
    arguments = ("generate", llava, "-p", "the ball", "--max-new-tokens", 8)
    answers = [
        lobcq.json(*arguments, *(word for file in order for word in ("--image", file)))["tokens"]
        for order in (images, images[::-1], images[:1])
    ]
    assert len(set(map(tuple, answers))) == 3


def test_without_a_template_the_prompt_is_continued(
    lobcq: Run, quantized_llava: Path, images: list[Path], edited: Callable[..., Path]
) -> None:
    folder = edited(quantized_llava, without=("chat_template.jinja",))
    arguments = ("--image", images[0], "-p", "<image> the ball", "--max-new-tokens", 8)
    expected = lobcq.json("generate", quantized_llava, "--no-chat", *arguments)
    found = lobcq.json("generate", folder, *arguments)
    assert not found["chat"]
    assert found["tokens"] == expected["tokens"]
    assert "has no chat template" in lobcq.refused("generate", folder, *arguments, "--chat", code=3)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--image", "A", "--no-chat", "-p", "the ball"), 3, "needs <image> for each --image"),
        (("--no-chat", "-p", "<image> the ball"), 3, "needs <image> for each --image"),
        (("--image", "NONE", "-p", "a"), 3, "there is no file"),
        (("--image", "TEXT", "-p", "a"), 3, "cannot read"),
        (("--image", "A", "-p", "a", "--onnx"), 2, "leave out --onnx"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    lobcq: Run,
    llava: Path,
    images: list[Path],
    text_file: Path,
    tmp_path: Path,
    arguments: Any,
    code: int,
    message: str,
) -> None:
    places = {"A": images[0], "NONE": tmp_path / "none.png", "TEXT": text_file}
    found = lobcq.refused("generate", llava, *(places.get(word, word) for word in arguments), code=code)
    assert message.replace(" ", "") in found.replace(" ", "")


def test_models_and_folders_that_take_no_images(
    lobcq: Run, llama: Path, llava: Path, images: list[Path], text_file: Path, tmp_path: Path,
    edited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shown = ("--image", images[0], "-p", "a")
    assert "LlamaForCausalLM takes no images" in lobcq.refused("generate", llama, *shown, code=2)
    bare = edited(llava, without=("processor_config.json",))
    assert "has no processor" in lobcq.refused("generate", bare, *shown, code=3)
    (bare / "preprocessor_config.json").write_text("{")
    assert "cannot load the processor" in lobcq.refused("generate", bare, *shown, code=3)
    shutil.rmtree(bare)
    arguments = ("quantize", llava, "-o", tmp_path / "out", "--calibrate", text_file)
    assert "calibrated on prompts with images" in lobcq.refused(*arguments, code=3)
    monkeypatch.setattr("lobcq_fx.cli.prompts.is_vision_available", lambda: False)
    assert "pip install pillow" in lobcq.refused("generate", llava, *shown, code=3)
