"""How far a quantized language model's predictions lie from the float model's: KL divergence and top-1 agreement.

Nothing but the two models' predictions enters, so that these figures see changes that a perplexity averages away.
Source: Kullback and Leibler, On Information and Sufficiency, 1951; llama.cpp's `llama-perplexity --kl-divergence` has
the same two figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lobcq_fx.evaluation.perplexity import PerplexityResult
from lobcq_fx.evaluation.predictions import Progress, predictions
from lobcq_fx.evaluation.windows import Window, separate_windows, sliding_windows

CHUNK = 64
"""Tokens whose fp64 log-probabilities are held at once, V for each and model."""


@dataclass(frozen=True)
class DivergenceResult:
    """A model beside its reference, over the same tokens.

    model, reference: each one's perplexity.
    kl_divergence: mean over the scored tokens of KL(reference || model), in nats.
    top1_agreement: of the scored tokens, the share for which both models' likeliest token is the same.
    """

    model: PerplexityResult
    reference: PerplexityResult
    kl_divergence: float
    top1_agreement: float

    @property
    def perplexity_ratio(self) -> float:
        """The model's perplexity in units of the reference's."""
        return self.model.perplexity / self.reference.perplexity

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        own = asdict(self)
        return {**own, "model": self.model.to_dict(), "reference": self.reference.to_dict()}


def divergence(
    model: nn.Module,
    reference: nn.Module,
    token_ids: Tensor | Sequence[int],
    *,
    window: int,
    stride: int,
    batch_size: int = 1,
    bos_token_id: int | None = None,
    progress: Progress | None = None,
) -> DivergenceResult:
    """Two models over one long text, window by window, each token scored once: the windows are `perplexity`'s.

    Args:
        model: a causal LM, usually quantized; called as `perplexity` says.
        reference: the float model, of the same vocabulary.
        token_ids: int [N] or [1, N], the whole text.
        window: tokens of a window, `bos_token_id` included; at most the models' maximum length.
        stride: from 1 to the text's tokens in a window.
        batch_size: windows in one call. No more than two batches of logits are held of a model.
        bos_token_id: put before every window; then each window's first token is scored too.
        progress: called as ("compare", windows done, windows in all).

    Raises:
        ValueError: an impossible window or stride, too few tokens, or vocabularies of different sizes.
    """
    windows = sliding_windows(token_ids, window, stride, bos_token_id)
    return _over(model, reference, windows, (window, stride), batch_size, progress)


def divergence_of_sequences(
    model: nn.Module,
    reference: nn.Module,
    sequences: Sequence[Tensor | Sequence[int]],
    *,
    max_length: int,
    batch_size: int = 1,
    bos_token_id: int | None = None,
    progress: Progress | None = None,
) -> DivergenceResult:
    """The same over separate sequences, each one window, as `perplexity_of_sequences` has them.

    Raises:
        ValueError: `max_length` below 2, too short sequences, or vocabularies of different sizes.
    """
    windows = separate_windows(sequences, max_length, bos_token_id)
    return _over(model, reference, windows, (max_length, None), batch_size, progress)


def _over(
    model: nn.Module,
    reference: nn.Module,
    windows: Sequence[Window],
    limits: tuple[int, int | None],
    batch_size: int,
    progress: Progress | None,
) -> DivergenceResult:
    sums = torch.zeros(4, dtype=torch.float64, device="cpu")
    for one in predictions([model, reference], windows, batch_size, "compare", progress):
        ours, theirs = one.logits
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the models predict {ours.shape[-1]} and {theirs.shape[-1]} tokens: compare models of one vocabulary"
            )
        for chunk in zip(one.tokens.split(CHUNK), ours.split(CHUNK), theirs.split(CHUNK), strict=True):
            sums += _sums(*chunk).cpu()
    scored = sum(one.scored for one in windows)
    own, their, divergence, same = (sums / scored).tolist()
    return DivergenceResult(
        PerplexityResult(own, scored, *limits), PerplexityResult(their, scored, *limits), divergence, same
    )


def _sums(tokens: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """Over n tokens: negative log-likelihood of both, KL divergence, how often both would say the same. fp64 [4]."""
    own, their = ours.double().log_softmax(dim=-1), theirs.double().log_softmax(dim=-1)
    probability = their.exp()
    # What the reference rules out (a logit of -inf) adds nothing, whatever the model thinks of it.
    terms = torch.where(probability == 0, 0, probability * (their - own))
    nll = [-one.gather(-1, tokens[:, None]).sum() for one in (own, their)]
    return torch.stack((*nll, terms.sum(), (ours.argmax(-1) == theirs.argmax(-1)).double().sum()))
