"""What language models predict for windows, a batch at a time: logits of a whole text are never held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobcq_fx.evaluation.windows import Window
from lobcq_fx.graph.attributes import device_of

Progress = Callable[[str, int, int], None]
"""Called with (step, done, total)."""


@dataclass(frozen=True)
class Predictions:
    """Of the scored tokens of one window.

    window: its place among the windows.
    tokens: what came, int64 [n], on the first model's device.
    logits: what each model predicted, [n, V] each, on the first model's device.
    """

    window: int
    tokens: Tensor
    logits: list[Tensor]


@dataclass(frozen=True)
class LogLikelihood:
    """Of a window's scored tokens: the sum in nats, and whether each of them was the likeliest one."""

    total: float
    greedy: bool


@torch.no_grad()
def predictions(
    models: Sequence[nn.Module],
    windows: Sequence[Window],
    batch_size: int,
    step: str,
    progress: Progress | None = None,
) -> Iterator[Predictions]:
    """Predictions for every window, the shortest windows first; batches are padded on the right, with a mask.

    Args:
        models: causal LMs, called with input_ids and attention_mask [B, T]; they return an object with logits
            [B, T, V].
        windows: what to predict.
        batch_size: windows in one call.
        step: what progress is told, with windows done and windows in all.
        progress: called after each batch.

    Raises:
        ValueError: `batch_size` below 1, or a model predicts NaN, of which every figure would be wrong.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: choose at least 1")
    order = sorted(range(len(windows)), key=lambda index: len(windows[index].tokens))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        # Nobody asks what comes after a window's last token.
        fed = [windows[index].tokens[:-1] for index in batch]
        logits = [_logits(model, fed).to(device_of(models[0])) for model in models]
        for row, (index, tokens) in enumerate(zip(batch, fed, strict=True)):
            rows = slice(len(tokens) - windows[index].scored, len(tokens))
            came = windows[index].tokens[1:][rows].to(logits[0].device)
            found = [one[row, rows] for one in logits]
            _refuse_nan(models, found)
            yield Predictions(index, came, found)
        if progress is not None:
            progress(step, first + len(batch), len(order))


def log_likelihoods(
    model: nn.Module,
    windows: Sequence[Window],
    *,
    batch_size: int,
    step: str,
    progress: Progress | None = None,
) -> list[LogLikelihood]:
    """Of each window's scored tokens, in the order of the windows; the arguments are those of `predictions`."""
    found: dict[int, LogLikelihood] = {}
    for one in predictions([model], windows, batch_size, step, progress):
        (logits,) = one.logits
        losses = F.cross_entropy(logits.float(), one.tokens, reduction="none").double()
        greedy = bool((logits.argmax(dim=-1) == one.tokens).all())
        found[one.window] = LogLikelihood(-losses.sum().item(), greedy)
    return [found[index] for index in range(len(windows))]


def _refuse_nan(models: Sequence[nn.Module], logits: Sequence[Tensor]) -> None:
    for model, one in zip(models, logits, strict=True):
        if one.isnan().any():
            raise ValueError(
                f"{type(model).__name__} predicts NaN, so that no figure of it would mean anything: look for overflow"
                " (fp16?) or damaged weights"
            )


def _logits(model: nn.Module, sequences: Sequence[Tensor]) -> Tensor:
    """[B, longest, V] for sequences int64 [T_i] on the CPU."""
    lengths = torch.tensor([len(one) for one in sequences], dtype=torch.long, device="cpu")
    input_ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    places = torch.arange(input_ids.shape[1], dtype=torch.long, device="cpu")
    attention_mask = (places < lengths[:, None]).long()
    device = device_of(model)
    found = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
    logits: Tensor = found.logits
    return logits
