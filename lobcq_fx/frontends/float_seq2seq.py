"""What a float encoder-decoder does, found out by calling it: its cache, its outputs, and what it makes of labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.float_causal_lm import as_named_by, counted, takes
from lobcq_fx.frontends.output_types import CACHE_NAME
from lobcq_fx.frontends.plain_outputs import EXTRA_OUTPUTS, plain_outputs
from lobcq_fx.frontends.seq2seq_cache import new_cache
from lobcq_fx.frontends.seq2seq_call import MASK, POSITIONS, TOKEN_MASK, TOKENS
from lobcq_fx.frontends.seq2seq_labels import SHIFTS, shifted

# Every size is different and at least 2: export bakes dimensions of 0 or 1 in and may identify equal ones.
BATCH, SOURCE, PAST, QUERY = 2, 11, 5, 3

REMEDY = (
    "Remedy: quantize model.get_encoder() alone, and pass what it returns to the float model as encoder_outputs; or"
    " wrap it in a torch.nn.Module that calls it with use_cache=False and returns the logits, and quantize that with"
    " example_inputs"
)


class CrossCache(DynamicCache):  # type: ignore[misc]
    """Keys and values of cross-attentions as they are computed: in a trace, nothing is appended to them."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep [B, H, S, D]."""
        while len(self.layers) <= layer_idx:
            self.layers.append(DynamicLayer())
        layer = self.layers[layer_idx]
        layer.lazy_initialization(key_states, value_states)
        layer.keys, layer.values = key_states, value_states
        return key_states, value_states


@contextmanager
def seq2seq_outputs(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model returns logits, cache and the encoder's hidden state by name; encoders cache nothing."""
    with plain_outputs(model, EXTRA_OUTPUTS | {"return_dict"}), plain_outputs(model.get_decoder(), {"use_cache"}):
        yield


def main_inputs(model: PreTrainedModel, example: Tensor | None, batch: int, source: int) -> dict[str, Tensor]:
    """What the encoder reads, and its mask, the first sequence padded on the right, where the model takes one.

    Args:
        model: the model.
        example: of its main input, any batch; None makes one up.
        batch: sequences.
        source: their length, where they are tokens.

    Raises:
        TraceError: none can be made up.
    """
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        ids = tokens(batch, source, model.device)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        return {name: ids, MASK: mask}
    if example is None:
        bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
        strides = [one.stride[0] for one in model.get_encoder().children() if isinstance(one, torch.nn.Conv1d)]
        if name != "input_features" or not (bins and positions and strides):
            raise TraceError(
                f"cannot make up an example for {type(model).__name__}, whose input is {name!r} of a size that its"
                f" configuration does not tell: pass example_inputs={{{name!r}: ...}}"
            )
        frames = positions * int(torch.tensor(strides, dtype=torch.long, device="cpu").prod())
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(batch, bins, frames, generator=generator, dtype=torch.float32, device="cpu")
    rows = torch.arange(batch, dtype=torch.long, device=example.device) % len(example)
    features = example.index_select(0, rows).to(model.device, model.dtype)
    mask = torch.ones((batch, features.shape[-1]), dtype=torch.long, device=model.device)
    mask[0, -2:] = 0
    return {name: features} | ({MASK: mask} if takes(model, MASK) else {})


def tokens(batch: int, length: int, device: torch.device) -> Tensor:
    """Ids [batch, length] of a small vocabulary."""
    return (torch.arange(batch * length, dtype=torch.long, device=device).view(batch, length) * 5 + 3) % 11


def decoder_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Tokens [batch, length], a mask that hides the first two of the first row, and positions if it takes them."""
    ids = tokens(batch, length, model.device)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = {POSITIONS: counted(mask)} if takes(model, POSITIONS) else {}
    return {TOKENS: ids, TOKEN_MASK: mask, **positions}


def cut(given: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """A part of decoder inputs, whose mask goes from the first token on."""
    part = {name: value[:, start:stop].clone() for name, value in given.items()}
    return part | {TOKEN_MASK: given[TOKEN_MASK][:, :stop].clone()}


def continuation(model: PreTrainedModel, example: Tensor | None) -> tuple[dict[str, Any], Any]:
    """A call with QUERY tokens after PAST cached ones, which encodes anew, and what the PAST ones gave.

    Raises:
        TraceError: the model keeps another cache than keys and values of both attentions.
    """
    source, decoder = main_inputs(model, example, BATCH, SOURCE), decoder_inputs(model, BATCH, PAST + QUERY)
    prompt = {**source, **cut(decoder, 0, PAST), "past_key_values": new_cache()}
    output = model(**as_named_by(model, prompt))
    cache = getattr(output, CACHE_NAME, None)
    if not isinstance(cache, EncoderDecoderCache) or not all(_filled(one, model) for one in _caches(cache)):
        raise TraceError(
            f"{type(model).__name__} does not keep plain keys and values [B, H, T, D] of every self- and"
            f" cross-attention in an EncoderDecoderCache. {REMEDY}"
        )
    cache = EncoderDecoderCache(cache.self_attention_cache, CrossCache())
    return {**source, **cut(decoder, PAST, PAST + QUERY), "past_key_values": cache}, output


def label_shift(model: PreTrainedModel, source: dict[str, Tensor]) -> tuple[str | None, bool]:
    """By which rule the decoder's tokens follow from labels, None for another; whether such calls return a cache.

    Args:
        model: the model.
        source: what the encoder reads.
    """
    pad, start = model.config.pad_token_id, getattr(model.config, "decoder_start_token_id", None)
    labels = tokens(len(source[model.main_input_name]), PAST, model.device) + 4
    outside = start is not None and not 0 <= start < model.config.get_text_config().vocab_size
    if not takes(model, "labels") or pad is None or outside:
        return None, False
    try:
        output = model(**source, labels=labels)
    except (TypeError, ValueError):  # without a token to start from
        return None, False
    cached = getattr(output, CACHE_NAME, None) is not None
    for rule in SHIFTS:
        if rule == "start" and start is None:
            continue
        given = shifted(labels, rule, pad, start)
        logits = model(**source, **{TOKENS: given}).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        if _close(output.logits, logits) and _close(output.loss, loss):
            return rule, cached
    return None, cached


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=1e-4, atol=1e-5)


def _caches(cache: EncoderDecoderCache) -> tuple[Any, Any]:
    return cache.self_attention_cache, cache.cross_attention_cache


def _filled(cache: Any, model: PreTrainedModel) -> bool:
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(getattr(layer, "keys", None) is not None and layer.keys.dim() == 4 for layer in layers)
