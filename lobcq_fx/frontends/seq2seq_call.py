"""How an encoder-decoder is called in one go: what it reads and an answer's first tokens in, logits and cache out.

MAIN's inputs: the encoder's and the decoder's tensors, then key and value [B, H, P, D] of each self-attention. Its
outputs: logits [B, T, V], the grown keys and values [B, H, P + T, D], those of each cross-attention [B, H, S, D], and
the encoder's last hidden state [B, S, E].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.cache_utils import EncoderDecoderCache
from transformers.utils import ModelOutput

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.causal_lm_call import CACHE_DTYPES
from lobcq_fx.frontends.growing_cache import grow
from lobcq_fx.frontends.output_types import CACHE_NAME, LAST_HIDDEN_STATE, RETURNED_OF_SEQ2SEQ, output_type
from lobcq_fx.frontends.seq2seq_cache import fill_cross, new_cache, states_of
from lobcq_fx.frontends.seq2seq_labels import IGNORED_LABEL, SHIFTS, shifted
from lobcq_fx.tracing.calling import CallingConvention
from lobcq_fx.tracing.example import LARGEST_SIZE
from lobcq_fx.tracing.guards import SizeGuards

MAIN_INPUTS = ("input_ids", "input_features")
"""What an encoder may read."""

MASK = "attention_mask"
TOKENS, TOKEN_MASK, POSITIONS = "decoder_input_ids", "decoder_attention_mask", "decoder_position_ids"

PARAMETERS = (MASK, TOKENS, TOKEN_MASK, "encoder_outputs", "past_key_values")
"""What forward takes by position behind the encoder's input, as Hugging Face models do."""

UNDERSTOOD = {*PARAMETERS, POSITIONS, "labels", "use_cache", "return_dict", "tokenizer", "cache_position"}


@dataclass(frozen=True)
class Seq2SeqCall(CallingConvention):
    """Calls of a traced encoder-decoder.

    encoder_inputs: the graph's tensors of the encoder, in order: what the model reads, then its mask if the graph reads
        one. decoder_inputs: those of the decoder before the cache.
    input_shape: of what the model reads, None where a size is free.
    cache_heads, cross_heads: for each decoder layer, heads and the widths of a key and a value.
    cache_dtype: of an empty cache and of the encoder's hidden states, for example "float32".
    hidden_size: the encoder's.
    vocab_size: of the logits.
    output_type: name of a class, as `lobcq_fx.frontends.output_types` finds it; output_class: the class.
    label_shift: how the decoder's tokens follow from labels, one of `SHIFTS`; None where labels are not served.
    pad_token_id, decoder_start_token_id: what that needs.
    cached_with_labels: a call with labels returns a cache too.
    guards: what the trace assumed of the sizes of all inputs up to the first key.
    """

    kind: ClassVar[str] = "seq2seq"

    encoder_inputs: tuple[str, ...]
    decoder_inputs: tuple[str, ...]
    input_shape: tuple[int | None, ...]
    cache_heads: tuple[tuple[int, int, int], ...]
    cross_heads: tuple[tuple[int, int, int], ...]
    cache_dtype: str
    hidden_size: int
    vocab_size: int
    output_type: str
    label_shift: str | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    cached_with_labels: bool = False
    guards: SizeGuards = field(default_factory=SizeGuards)
    output_class: type[ModelOutput] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = output_type(self.output_type)
        if RETURNED_OF_SEQ2SEQ - found.__dataclass_fields__.keys():
            raise ValueError(
                f"output_type is {self.output_type!r}, which lacks a field for what an encoder-decoder gives"
            )
        object.__setattr__(self, "output_class", found)
        object.__setattr__(self, "_encoder_guards", self.guards.among(len(self.encoder_inputs)))
        object.__setattr__(self, "_decoder_guards", self.guards.without(0))

    @property
    def main_input(self) -> str:
        """Name of what the encoder reads."""
        return self.encoder_inputs[0]

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The encoder's and the decoder's tensors, then keys and values of the cached tokens."""
        call = self.arguments(args, kwargs)
        encoder = self.encoder_tensors(call)
        decoder, states = self.decoder_tensors(call)
        if decoder[0].shape[0] != encoder[0].shape[0]:
            raise CallError(
                f"{TOKENS} has {decoder[0].shape[0]} sequences and {self.main_input} {encoder[0].shape[0]}: pass as"
                " many"
            )
        self.guards.check([*encoder, *decoder, states[0]], self.name_of)
        return [*encoder, *decoder, *states]

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output class; the cache, the caller's or a new one, has grown and holds the cross-attention's."""
        call = self.arguments(args, kwargs)
        own, cross = 2 * len(self.cache_heads), 2 * len(self.cross_heads)
        logits, hidden = outputs[0], outputs[-1]
        cache, loss = None, self.loss_of(logits, call)
        if self.wants_cache(call):
            cache = call.get("past_key_values")
            cache = new_cache() if cache is None else cache
            grow(cache.self_attention_cache, outputs[1 : 1 + own])
            fill_cross(cache, outputs[1 + own : 1 + own + cross])
        return self.output(loss, logits, cache, hidden, call)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call as {name: value}, what asks for nothing left out; labels stand in for the decoder's tokens.

        Raises:
            CallError: an argument that no quantized encoder-decoder takes.
        """
        call = dict(zip((self.main_input, *PARAMETERS), args, strict=False)) | dict(kwargs)
        for name, value in call.items():
            if name not in UNDERSTOOD and name != self.main_input and value is not None and value is not False:
                taken = ", ".join((self.main_input, *PARAMETERS, POSITIONS, "labels", "use_cache", "return_dict"))
                raise CallError(
                    f"argument {name!r} is not supported; a quantized {self.output_type} model takes {taken}"
                )
        call = {name: value for name, value in call.items() if value is not None}
        cache = call.get("past_key_values")
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise CallError(
                f"past_key_values is a {type(cache).__name__}: pass EncoderDecoderCache(DynamicCache(),"
                " DynamicCache()), of transformers, which keeps both attentions' keys and values, and grows in place"
            )
        if TOKENS not in call and "labels" in call:
            call[TOKENS] = self._shifted(call["labels"])
        return call

    def encoder_tensors(self, call: Mapping[str, Any]) -> list[Tensor]:
        """What the encoder reads, as a graph takes it.

        Raises:
            CallError: it is missing, or of another form than the traced one.
        """
        value = call.get(self.main_input)
        if not isinstance(value, Tensor):
            found = "missing" if value is None else f"a {type(value).__name__}"
            raise CallError(f"{self.main_input} is {found}: pass a tensor, or encoder_outputs")
        fits = value.dim() == len(self.input_shape) and all(
            size is None or size == actual for size, actual in zip(self.input_shape, value.shape, strict=True)
        )
        kinds = (torch.int64, torch.int32) if self.main_input == "input_ids" else (getattr(torch, self.cache_dtype),)
        if not fits or value.dtype not in kinds:
            wanted = ", ".join("any" if size is None else str(size) for size in self.input_shape)
            raise CallError(f"{self.main_input} is a {value.dtype} of {list(value.shape)}: pass {kinds[0]} [{wanted}]")
        tensors = [value]
        if MASK in self.encoder_inputs:
            tensors.append(mask_of(MASK, call.get(MASK), value.shape[0], value.shape[1], value.device))
        self._encoder_guards.check(tensors, self.name_of)  # type: ignore[attr-defined]
        return tensors

    def decoder_tensors(self, call: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """The decoder's tensors before the cache; keys and values of the self-attention.

        Raises:
            CallError: the tokens are missing, or something does not fit them.
        """
        ids = call.get(TOKENS)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            found = "missing" if ids is None else _described(ids)
            raise CallError(f"{TOKENS} is {found}: pass an int64 of [batch, length], or labels")
        states = self._past(call.get("past_key_values"), ids)
        batch, query = ids.shape
        length = states[0].shape[2]
        values = {TOKENS: ids, TOKEN_MASK: mask_of(TOKEN_MASK, call.get(TOKEN_MASK), batch, length + query, ids.device)}
        if POSITIONS in self.decoder_inputs:
            values[POSITIONS] = self._positions(call.get(POSITIONS), ids, length)
        elif POSITIONS in call:
            raise CallError(f"{POSITIONS} is not supported: the float model takes none")
        return [values[name] for name in self.decoder_inputs], states

    def check_decoder(self, mask: Sequence[Tensor], decoder: Sequence[Tensor], first_key: Tensor) -> None:
        """That the graph was traced for such sizes, where only the encoder's mask is there, if any."""
        self._decoder_guards.check(  # type: ignore[attr-defined]
            [*mask, *decoder, first_key], lambda place: self.name_of(place + 1)
        )

    def name_of(self, place: int) -> str:
        """What a caller calls an input of the graph."""
        names = (*self.encoder_inputs, *self.decoder_inputs)
        return names[place] if place < len(names) else "past_key_values.self_attention_cache.layers[0].keys"

    def loss_of(self, logits: Tensor, call: Mapping[str, Any]) -> Tensor | None:
        """The cross-entropy of a call's labels, None without any.

        Raises:
            CallError: the float model's loss is another; the cache is as it was.
        """
        labels = call.get("labels")
        if labels is None:
            return None
        if self.label_shift is None:
            raise CallError("labels: the float model's loss is not the cross-entropy of them: compute it from logits")
        return cross_entropy(logits.reshape(-1, self.vocab_size), labels.reshape(-1), ignore_index=IGNORED_LABEL)

    def output(self, loss: Tensor | None, logits: Tensor, cache: Any, hidden: Any, call: Mapping[str, Any]) -> Any:
        """What the model returns for a call."""
        if call.get("return_dict") is False:
            return tuple(value for value in (loss, logits, cache, hidden) if value is not None)
        return self.output_class(loss=loss, logits=logits, **{CACHE_NAME: cache, LAST_HIDDEN_STATE: hidden})

    @property
    def arity(self) -> tuple[int, int]:
        """Tensors and states; logits, the states of both attentions, and the hidden state."""
        own, cross = 2 * len(self.cache_heads), 2 * len(self.cross_heads)
        return len(self.encoder_inputs) + len(self.decoder_inputs) + own, 2 + own + cross

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        settings = asdict(self)
        del settings["output_class"]  # what output_type names
        return {"kind": self.kind, **settings, "guards": self.guards.to_list()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Seq2SeqCall:
        """Inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: something that no traced model has.
        """
        settings = {key: value for key, value in values.items() if key != "kind"}
        for name in ("encoder_inputs", "decoder_inputs", "input_shape"):
            settings[name] = tuple(settings[name])
        for name in ("cache_heads", "cross_heads"):
            settings[name] = tuple((heads, key, value) for heads, key, value in settings[name])
        settings["guards"] = SizeGuards.from_list(settings["guards"])
        _validate(settings)
        return cls(**settings)

    def wants_cache(self, call: Mapping[str, Any]) -> bool:
        """Whether the model returns a cache for a call."""
        return call.get("use_cache") is not False and ("labels" not in call or self.cached_with_labels)

    def _shifted(self, labels: Any) -> Tensor:
        """The decoder's tokens for labels [B, T]."""
        if self.label_shift is None or not isinstance(labels, Tensor) or labels.dim() != 2:
            raise CallError(f"labels alone are not served here: pass {TOKENS} [batch, length] too")
        assert self.pad_token_id is not None
        return shifted(labels, self.label_shift, self.pad_token_id, self.decoder_start_token_id)

    def _past(self, cache: EncoderDecoderCache | None, ids: Tensor) -> list[Tensor]:
        """Keys and values of every self-attention in turn; empty ones where there is no cache yet."""
        if cache is None or cache.get_seq_length() == 0:
            dtype = getattr(torch, self.cache_dtype)
            shapes = [(ids.shape[0], heads, 0, width) for heads, *widths in self.cache_heads for width in widths]
            return [torch.empty(shape, dtype=dtype, device=ids.device) for shape in shapes]
        return states_of(cache.self_attention_cache, self.cache_heads, ids.shape[0])

    def _positions(self, given: Tensor | None, ids: Tensor, past: int) -> Tensor:
        batch, query = ids.shape
        if given is not None:
            return given.expand(batch, query)
        return torch.arange(past, past + query, dtype=torch.long, device=ids.device).expand(batch, query)


def mask_of(name: str, given: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """A mask [B, L] as a call has it, or one that hides nothing.

    Raises:
        CallError: it is of another size.
    """
    if given is None:
        return torch.ones((batch, length), dtype=torch.long, device=device)
    if not isinstance(given, Tensor) or tuple(given.shape) != (batch, length):
        raise CallError(f"{name} is {_described(given)}: pass [{batch}, {length}], cached tokens included")
    return given


def _described(value: Any) -> str:
    return f"a {value.dtype} of {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _validate(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError where a call would stumble over what a file says."""
    encoder, decoder, shape = (settings[name] for name in ("encoder_inputs", "decoder_inputs", "input_shape"))
    if encoder not in [(name, *mask) for name in MAIN_INPUTS for mask in ((), (MASK,))]:
        raise ValueError(f"encoder_inputs are {encoder}")
    if decoder not in ((TOKENS, TOKEN_MASK), (TOKENS, TOKEN_MASK, POSITIONS)):
        raise ValueError(f"decoder_inputs are {decoder}")
    if settings["cache_dtype"] not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype is {settings['cache_dtype']!r}; it may be {', '.join(CACHE_DTYPES)}")
    if settings["label_shift"] not in (None, *SHIFTS):
        raise ValueError(f"label_shift is {settings['label_shift']!r}")
    tokens = (settings["pad_token_id"], settings["decoder_start_token_id"])
    wanted = tokens[: {None: 0, "wrap": 1, "start": 2}[settings["label_shift"]]]
    if any(type(token) is not int or not 0 <= token < LARGEST_SIZE for token in wanted):
        raise ValueError(f"pad_token_id and decoder_start_token_id are {tokens}")
    layers = (*settings["cache_heads"], *settings["cross_heads"])
    sizes = [settings["hidden_size"], settings["vocab_size"], *(size for layer in layers for size in layer)]
    sizes += [size for size in shape if size is not None]
    if any(type(size) is not int or not 0 < size < LARGEST_SIZE for size in sizes):
        raise ValueError(f"hidden_size, vocab_size, input_shape and heads hold {sizes[:9]}, which are no sizes")
    if not settings["cache_heads"] or len(settings["cross_heads"]) != len(settings["cache_heads"]) or len(shape) < 2:
        raise ValueError(
            "a decoder has layers, each with a self- and a cross-attention, and an input has two dimensions"
        )
    settings["guards"].validate([len(shape), *[2] * (len(encoder) - 1 + len(decoder)), 4])
