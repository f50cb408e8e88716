"""A text and what may follow it, as tokens: what multiple choice and last words are measured by.

Rules: lm-evaluation-harness 0.4.13, `TemplateLM._encode_pair` and `HFLM._loglikelihood_tokens`
(https://github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

from typing import Any

from lobcq_fx.evaluation.windows import Window, as_token_ids


def leading_bos(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token if the tokenizer puts one before every text, else None."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def continuation_window(tokenizer: Any, context: str, continuation: str, max_length: int | None) -> Window:
    """The tokens of `context + continuation`, of which the continuation's are scored.

    The two are tokenized together and parted where the context's own tokens end; spaces at the context's end go to the
    continuation. The beginning-of-sequence token is put first if the tokenizer puts one.

    Args:
        tokenizer: a Hugging Face tokenizer.
        context: not empty.
        continuation: begins with whatever separates it from the context.
        max_length: tokens that the model takes: where there are more, the context loses its first ones. None: no limit.

    Raises:
        ValueError: there is nothing to score, or the continuation alone is too long.
    """
    bare = context.rstrip()
    whole = _tokens(tokenizer, context + continuation)
    start = len(_tokens(tokenizer, bare)) if bare else 0
    bos = leading_bos(tokenizer)
    tokens = whole if bos is None else [bos, *whole]
    scored = len(whole) - start
    if scored < 1 or scored == len(tokens):
        raise ValueError(f"of {context[-40:]!r} + {continuation!r} no tokens are the latter's alone, after some others")
    if max_length is not None and scored > max_length:
        raise ValueError(f"{continuation[:40]!r} is {scored} tokens long; the model takes {max_length}")
    # The last token is not fed: there is room for one more than the model takes.
    return Window(as_token_ids(tokens if max_length is None else tokens[-max_length - 1 :]), scored)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: that the text is longer than the model is no mistake here.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
