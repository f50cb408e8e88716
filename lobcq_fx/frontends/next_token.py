"""How far a language model's predictions are from another's."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div


def next_token_divergence(logits: Tensor, expected: Tensor) -> float:
    """The KL divergence of the distribution of `logits` [..., V] from the expected one's, in nats a token."""
    own, their = (one.float().log_softmax(-1) for one in (logits, expected))
    terms = kl_div(own, their, reduction="none", log_target=True)
    return float(terms.nan_to_num(nan=0.0).sum(-1).mean())  # NaN is where both rule a token out
