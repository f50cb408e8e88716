"""`lobcq generate`: continue a prompt."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lobcq_fx.cli.options import Attention, AttentionOption, JsonOption, KvCacheOption, ModelArgument

if TYPE_CHECKING:
    from torch import nn

    from lobcq_fx.cli.inputs import ModelFolder


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens at random instead of taking the likeliest.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample: higher is more random.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="With --sample: draw from the likeliest tokens only.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="With --sample: fixes what is drawn.")] = 0,
    kv_cache: KvCacheOption = None,
    attention: AttentionOption = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="DIR is one that `lobcq export onnx` wrote; runs in ONNX Runtime.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Continue a prompt with a float, quantized or exported language model; the text appears as it is made."""
    from lobcq_fx.cli.console import messages, print_json
    from lobcq_fx.cli.failures import InputError
    from lobcq_fx.cli.inputs import load_model, load_tokenizer, model_folder

    folder = model_folder(model)
    if not folder.is_causal_lm:
        raise InputError(f"{folder.architecture} cannot generate text: pass a causal language model")
    tokenizer = load_tokenizer(folder)
    if not prompt:
        raise typer.BadParameter("the prompt is empty: give a few words to continue")
    if kv_cache is not None and onnx:
        raise typer.BadParameter("--kv-cache: an exported model keeps keys and values in float: leave out --onnx")
    if attention is not None and kv_cache is None:
        raise typer.BadParameter("--attention: it multiplies keys and values in LO-BCQ: pass --kv-cache too")
    cache = {} if kv_cache is None else _cache(kv_cache, attention or Attention.w4a16)
    with messages.status("Loading the model"):
        language_model = _onnx_model(folder) if onnx else load_model(folder)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample, **cache}
    if sample:
        settings |= {"temperature": temperature, "top_p": top_p}
    inputs, tokens, seconds = _run(language_model, tokenizer, prompt, settings, seed, stream=not json)
    if json:
        new = tokenizer.decode(tokens, skip_special_tokens=True)
        print_json(
            {"prompt": prompt, "text": new, "prompt_tokens": inputs, "tokens": tokens, "seconds": round(seconds, 3)}
        )
        return
    rate = len(tokens) / seconds if seconds else 0.0
    messages.print(f"[dim]{len(tokens)} tokens in {seconds:.1f} s ({rate:.1f} tokens/s)[/]", highlight=False)


def _cache(format: str, attention: Attention) -> dict[str, Any]:
    """The argument of `model.generate` that gives it a quantized cache."""
    from lobcq_fx import LobcqCache
    from lobcq_fx.frontends.output_types import CACHE_NAME

    return {CACHE_NAME: LobcqCache(format, attention=attention.value)}


def _onnx_model(folder: ModelFolder) -> nn.Module:
    from lobcq_fx.export import OnnxCausalLM, library

    return OnnxCausalLM(folder.path, use_library=library.is_available())


def _run(
    model: nn.Module, tokenizer: Any, prompt: str, settings: dict[str, Any], seed: int, *, stream: bool
) -> tuple[int, list[int], float]:
    """Tokens in the prompt, the new tokens, and seconds."""
    import torch
    from transformers import TextStreamer

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if stream:
        typer.echo(prompt, nl=False)
        settings = {**settings, "streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)}
    torch.manual_seed(seed)
    started = time.perf_counter()
    output = model.generate(**inputs, **settings)  # type: ignore[operator]
    seconds = time.perf_counter() - started
    length = inputs["input_ids"].shape[1]
    return length, output[0, length:].tolist(), seconds
