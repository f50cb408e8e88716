"""The calls that an encoder-decoder's graphs are tried on: the first tokens of answers, and the step after them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lobcq_fx.frontends.float_causal_lm import as_named_by
from lobcq_fx.frontends.float_seq2seq import cut, decoder_inputs, main_inputs, seq2seq_outputs
from lobcq_fx.frontends.output_types import CACHE_NAME
from lobcq_fx.frontends.seq2seq_cache import new_cache
from lobcq_fx.frontends.seq2seq_call import TOKEN_MASK
from lobcq_fx.trial import Callee, Outcome, Trial

BATCH, SOURCE, ANSWER = 3, 7, 6
"""Not what the graph was traced with."""


def by_steps(model: PreTrainedModel, example: Tensor | None) -> Trial:
    """Both calls bring the encoder's input: a graph of whole calls encodes twice, and the model uses its cache."""
    source, decoder = main_inputs(model, example, BATCH, SOURCE), decoder_inputs(model, BATCH, ANSWER)

    def call(callee: Callee, start: int, stop: int, cache: Any) -> Any:
        kept = {**source, **cut(decoder, start, stop), "past_key_values": cache}
        if callee is not model:
            return callee(**kept, use_cache=True, return_dict=True)
        with seq2seq_outputs(model):
            return callee(**as_named_by(model, kept))

    def run(callee: Callee) -> Outcome:
        first = call(callee, 0, ANSWER - 1, new_cache())
        step = call(callee, ANSWER - 1, ANSWER, getattr(first, CACHE_NAME))
        real = first.logits[decoder[TOKEN_MASK][:, :-1].bool()]  # a padded position's logits mean nothing
        return Outcome(type(first), (real, step.logits))

    return run
