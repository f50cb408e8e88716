"""`lobcq chat`: talk with a model."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from lobcq_fx.cli.options import (
    AttentionOption,
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

LEAVE, FORGET = ("/exit", "/quit"), "/new"


def chat(
    model: ModelArgument,
    system: SystemOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    sample: SampleOption = False,
    temperature: TemperatureOption = 1.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    kv_cache: KvCacheOption = None,
    attention: AttentionOption = None,
) -> None:
    """Talk with a float or quantized language model that has a chat template; answers appear as they are made.

    Every line is a turn. /new begins another conversation; /exit, or the end of the input, leaves.
    """
    import torch
    from transformers import TextStreamer

    from lobcq_fx.cli.console import messages
    from lobcq_fx.cli.conversation import Conversation, check_template
    from lobcq_fx.cli.failures import InputError
    from lobcq_fx.cli.inputs import causal_lm_folder, load_model, load_tokenizer

    cache = cache_arguments(kv_cache, attention)
    folder = causal_lm_folder(model)
    tokenizer = load_tokenizer(folder)
    check_template(tokenizer, folder)
    settings = {"max_new_tokens": max_new_tokens, **sampling(sample, temperature, top_p)}
    with messages.status("Loading the model"):
        loaded = load_model(folder)
    talk = Conversation(loaded, tokenizer, system=system, max_length=folder.max_length, cache=cache, settings=settings)
    torch.manual_seed(seed)
    messages.print(f"[dim]{FORGET} begins anew, {LEAVE[0]} leaves[/]", highlight=False)
    while (line := _line()) is not None:
        if line in LEAVE:
            return
        if line == FORGET:
            talk.forget()
        elif line:
            started = time.perf_counter()
            try:
                new = talk.answer(line, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
            except InputError as error:  # the next line may do better
                messages.print(f"[bold red]lobcq:[/] {error}", highlight=False, soft_wrap=True)
                continue
            rate = len(new) / (time.perf_counter() - started)
            messages.print(f"[dim]{len(new)} tokens, {rate:.1f} tokens/s[/]", highlight=False)


def _line() -> str | None:
    """What the person says next; None at the end of the input."""
    from lobcq_fx.cli.console import messages

    try:
        messages.print("[bold cyan]> [/]", end="")
        return input().strip()
    except EOFError:
        return None
