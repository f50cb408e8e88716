"""`lobcq generate`: continue a prompt, or answer it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lobcq_fx.cli.options import (
    AttentionOption,
    JsonOption,
    KvCacheOption,
    ModelArgument,
    SampleOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TopPOption,
    cache_arguments,
    sampling,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lobcq_fx.cli.inputs import ModelFolder

STDIN = "-"


def generate(
    model: ModelArgument,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help=f"Text to continue, or question; {STDIN!r} reads standard input.")
    ] = STDIN,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Image that the prompt is about, of a vision-language model; repeatable."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt into the model's chat template, or continue it as it is. Default: the template of a"
            " tokenizer that has one.",
            show_default=False,
        ),
    ] = None,
    system: SystemOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End where this text has come; repeatable.")
    ] = None,
    sample: SampleOption = False,
    temperature: TemperatureOption = 1.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    kv_cache: KvCacheOption = None,
    attention: AttentionOption = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="DIR is one that `lobcq export onnx` wrote; runs in ONNX Runtime.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Continue or answer a prompt with a float, quantized or exported model; the text appears as it is made.

    An encoder-decoder translates or summarizes it, whatever it was trained for. A vision-language model is shown images
    with it: before the prompt in a chat, else in the places of the image tokens that the prompt has.
    """
    from lobcq_fx.cli.console import messages, print_json
    from lobcq_fx.cli.conversation import check_template
    from lobcq_fx.cli.inputs import generating_folder, load_model, load_processor, load_reader
    from lobcq_fx.cli.prompts import model_inputs, read_image, tokenizer_of

    folder = generating_folder(model)
    if folder.is_text_to_text and (onnx or kv_cache is not None):
        option = "--onnx" if onnx else "--kv-cache"
        raise typer.BadParameter(
            f"{option}: {folder.architecture} is an encoder-decoder, which runs in PyTorch, with keys and values in"
            " float: leave it out"
        )
    if image and not folder.takes_images:
        raise typer.BadParameter(f"--image: {folder.architecture} takes no images: leave it out")
    if image and onnx:
        raise typer.BadParameter("--image: an exported model reads text alone: leave out --onnx")
    reader = load_processor(folder) if image else load_reader(folder)
    if chat:
        check_template(reader, folder)
    chat = bool(reader.chat_template) if chat is None else chat
    if system is not None and not chat:
        raise typer.BadParameter("--system: there are instructions in a chat alone")
    if kv_cache is not None and onnx:
        raise typer.BadParameter("--kv-cache: an exported model keeps keys and values in float: leave out --onnx")
    given = cache_arguments(kv_cache, attention)
    prompt = _given(prompt)
    inputs = model_inputs(reader, prompt, [read_image(path) for path in image or ()], system, chat=chat)
    tokenizer = tokenizer_of(reader)
    cache = {} if given is None else _cache(given)
    with messages.status("Loading the model"):
        language_model = _onnx_model(folder) if onnx else load_model(folder)
    settings = {"max_new_tokens": max_new_tokens, **sampling(sample, temperature, top_p), **cache}
    if stop:
        settings |= {"stop_strings": stop, "tokenizer": tokenizer}
    if not json and not chat and not folder.is_text_to_text:
        typer.echo(prompt, nl=False)
    prompt_tokens = inputs["input_ids"].shape[1]
    begun = 1 if folder.is_text_to_text else prompt_tokens
    tokens, seconds = _run(language_model, tokenizer, inputs, begun, settings, seed, stream=not json)
    if json:
        print_json(
            {
                "prompt": prompt,
                "images": [str(path) for path in image or ()],
                "chat": chat,
                "text": tokenizer.decode(tokens, skip_special_tokens=True),
                "prompt_tokens": prompt_tokens,
                "tokens": tokens,
                "seconds": round(seconds, 3),
            }
        )
        return
    rate = len(tokens) / seconds if seconds else 0.0
    messages.print(f"[dim]{len(tokens)} tokens in {seconds:.1f} s ({rate:.1f} tokens/s)[/]", highlight=False)


def _given(prompt: str) -> str:
    """The prompt, from standard input where it says so."""
    if prompt == STDIN:
        if sys.stdin.isatty():
            raise typer.BadParameter("there is no prompt: pass --prompt TEXT, or pipe a text in")
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise typer.BadParameter("the prompt is empty: give a few words to continue")
    return prompt


def _cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """The argument of `model.generate` that gives it a quantized cache."""
    from lobcq_fx import LobcqCache
    from lobcq_fx.frontends.output_types import CACHE_NAME

    return {CACHE_NAME: LobcqCache(**arguments)}


def _onnx_model(folder: ModelFolder) -> nn.Module:
    from lobcq_fx.export import OnnxCausalLM, library

    return OnnxCausalLM(folder.path, use_library=library.is_available())


def _run(
    model: nn.Module,
    tokenizer: Any,
    inputs: Mapping[str, Tensor],
    begun: int,
    settings: dict[str, Any],
    seed: int,
    *,
    stream: bool,
) -> tuple[list[int], float]:
    """The new tokens, behind `begun` others, and seconds."""
    import torch
    from transformers import TextStreamer

    if stream:
        settings = {**settings, "streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}  # type: ignore[arg-type]
    torch.manual_seed(seed)
    started = time.perf_counter()
    output = model.generate(**inputs, **settings)  # type: ignore[operator]
    seconds = time.perf_counter() - started
    return output[0, begun:].tolist(), seconds
