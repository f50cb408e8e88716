"""How a decoder-only language model is called: keyword tensors and a cache in, logits and the grown cache out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from lobcq_fx.errors import CallError
from lobcq_fx.frontends.growing_cache import (
    Windows,
    check_windows,
    grow,
    is_empty,
    states_of,
    tokens_in,
    windowed_cache,
    windows_from,
)
from lobcq_fx.frontends.output_types import cache_field, output_type
from lobcq_fx.tracing.calling import CallingConvention
from lobcq_fx.tracing.example import LARGEST_SIZE
from lobcq_fx.tracing.guards import SizeGuards

PARAMETERS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "labels",
    "use_cache",
    "logits_to_keep",
    "return_dict",
)
"""What a quantized causal LM's forward understands, in the order Hugging Face models take their first ones."""

LOSS_SETTINGS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""What Hugging Face models hand on to their loss."""

WITHOUT_EFFECT = ("tokenizer", "cache_position")
"""What every Hugging Face model takes and leaves unread, though callers written for older ones still pass it."""

DEFAULTS = {"is_causal": True}
"""Values that ask for nothing, of arguments where that is not False."""

UNDERSTOOD = {*PARAMETERS, *LOSS_SETTINGS, *WITHOUT_EFFECT}

GRAPH_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "logits_to_keep"})
"""What the graph may take before the cache."""

CACHE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CausalLMCall(CallingConvention):
    """Calls of a traced causal language model.

    inputs: the graph's tensor inputs before the cache, in order.
    cache_heads: for each layer, heads and the widths of a key and a value.
    cache_dtype: dtype of an empty cache, for example "float32".
    positions_from_mask: default position_ids count along the mask instead of from `first_position` on.
    output_type: name of a class, as `lobcq_fx.frontends.output_types` finds it; output_class: the class.
    cache_name: what that class calls the cache.
    default_positions: False where the model counts by a rule of its own, so that calls have to pass position_ids.
    shifted_loss: labels give the cross-entropy with the next token, as they do by default.
    first_position: 1 where the model counts from there on.
    windows: of the layers that slide one; empty where none does, and where the graph takes whole layers alone.
    guards: what the trace assumed of the sizes of `inputs` and of the first key.
    """

    kind: ClassVar[str] = "causal_lm"

    inputs: tuple[str, ...]
    cache_heads: tuple[tuple[int, int, int], ...]
    cache_dtype: str
    positions_from_mask: bool
    vocab_size: int
    output_type: str
    default_positions: bool = True
    shifted_loss: bool = True
    first_position: int = 0
    windows: Windows = ()
    guards: SizeGuards = field(default_factory=SizeGuards)
    output_class: type[ModelOutput] = field(init=False, repr=False, compare=False)
    cache_name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Looked up once: the call itself is to be cheap, and plain enough for Dynamo.
        found = output_type(self.output_type)
        try:
            object.__setattr__(self, "cache_name", cache_field(found))
        except ValueError as error:
            raise ValueError(f"output_type is {self.output_type!r}: {error}") from None
        object.__setattr__(self, "output_class", found)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """input_ids, attention_mask, position_ids and logits_to_keep as the graph has them, then keys and values."""
        call = self.arguments(args, kwargs)
        ids = input_ids_of(call)
        cache = call.get("past_key_values")
        past = self._past(cache, ids)
        return self.inputs_of(call, ids, past[0], tokens_in(cache)) + past

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call as {name: value}.

        Raises:
            CallError: an argument that the graph does not serve.
        """
        return call_arguments(args, kwargs)

    def inputs_of(self, call: Mapping[str, Any], ids: Tensor, first_key: Tensor, past: int) -> list[Tensor]:
        """The graph's inputs before the cache.

        Args:
            call: as `arguments` gives it.
            ids: its input_ids [B, T].
            first_key: a tensor of the first key's shape [B, H, P, D], or of fewer tokens where that layer slides.
            past: tokens before the call, P.

        Raises:
            CallError: the traced graph cannot serve the call.
        """
        batch, query = ids.shape
        mask = call.get("attention_mask")
        if mask is None:
            refuse_packed(call)
            mask = torch.ones((batch, past + query), dtype=torch.long, device=ids.device)
        if tuple(mask.shape) != (batch, past + query):
            wanted = f"[{batch}, {past + query}], cached tokens included"
            raise CallError(f"attention_mask has shape {list(mask.shape)}: pass {wanted}")
        values = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": self._positions(call.get("position_ids"), mask, batch, query),
            "logits_to_keep": kept_positions(call.get("logits_to_keep"), query, ids.device),
            **self._more_inputs(call, mask),
        }
        inputs = [values[name] for name in self.inputs]
        self.guards.check([*inputs, first_key], self.name_of)
        return inputs

    def _more_inputs(self, call: Mapping[str, Any], mask: Tensor) -> dict[str, Tensor]:
        """What the graph of another kind takes besides."""
        return {}

    def name_of(self, place: int) -> str:
        """What a caller calls an input of the graph."""
        return self.inputs[place] if place < len(self.inputs) else "past_key_values.layers[0].keys"

    def unflatten(self, outputs: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output class with logits, the loss if labels were given, and the cache unless use_cache=False."""
        call = self.arguments(args, kwargs)
        logits, *states = outputs
        cache = None if call.get("use_cache") is False else self._grown(call, states)
        return self.output(logits, cache, call)

    def output(self, logits: Tensor, cache: Any, call: Mapping[str, Any]) -> Any:
        """What the model returns for a call, from the graph's logits and the cache."""
        if "logits_to_keep" not in self.inputs and call.get("logits_to_keep"):
            logits = logits[:, kept_positions(call["logits_to_keep"], logits.shape[1], logits.device)]
        labels = call.get("labels")
        if labels is not None and not self.shifted_loss:
            raise CallError("labels: the float model's loss is not that of the next token: compute it from the logits")
        settings = {name: call[name] for name in LOSS_SETTINGS if call.get(name) is not None}
        loss = None if labels is None else ForCausalLMLoss(logits, labels, self.vocab_size, **settings)
        cache = None if call.get("use_cache") is False else cache
        if call.get("return_dict") is False:
            return tuple(value for value in (loss, logits, cache) if value is not None)
        return self.output_class(loss=loss, logits=logits, **{self.cache_name: cache})

    @property
    def arity(self) -> tuple[int, int]:
        """Inputs, and the logits, each with the keys and values of every layer."""
        states = 2 * len(self.cache_heads)
        return len(self.inputs) + states, 1 + states

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        settings = asdict(self)
        del settings["output_class"], settings["cache_name"]  # what output_type names
        if not self.first_position:
            del settings["first_position"]  # which earlier releases do not know
        if not self.windows:
            del settings["windows"]  # nor that
        return {"kind": self.kind, **settings, "guards": self.guards.to_list()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CausalLMCall:
        """Inverse of `to_dict`; earlier releases wrote no guards.

        Raises:
            ValueError: a dtype or an output class that no traced model has, or guards that are about no input.
        """
        settings = cls.settings_from({key: value for key, value in values.items() if key != "kind"})
        if not settings["cache_heads"]:
            raise ValueError("cache_heads are of no layer")
        return cls(**settings)

    @staticmethod
    def settings_from(values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this class, from those of `to_dict` without its kind.

        Raises:
            ValueError: as `from_dict`.
        """
        if values["cache_dtype"] not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype is {values['cache_dtype']!r}; it may be {', '.join(CACHE_DTYPES)}")
        settings = dict(values)
        settings["inputs"] = tuple(settings["inputs"])
        if not GRAPH_INPUTS.issuperset(settings["inputs"]) or len(set(settings["inputs"])) < len(settings["inputs"]):
            raise ValueError(f"inputs are {settings['inputs']}; they may be {', '.join(sorted(GRAPH_INPUTS))}")
        settings["cache_heads"] = tuple((heads, key, value) for heads, key, value in settings["cache_heads"])
        settings["guards"] = guards_of(values, settings["inputs"])
        settings["windows"] = windows_from(values.get("windows", ()), len(settings["cache_heads"]))
        sizes = [settings["vocab_size"], *(size for layer in settings["cache_heads"] for size in layer)]
        if settings.get("first_position", 0) not in (0, 1):
            raise ValueError(f"first_position is {settings['first_position']!r}")
        if any(type(size) is not int or not 0 < size < LARGEST_SIZE for size in sizes):
            raise ValueError(f"vocab_size and cache_heads hold {sizes[:9]}, which are no sizes")
        return settings

    def _past(self, cache: Any, ids: Tensor) -> list[Tensor]:
        """Keys and values of every layer in turn; empty ones where there is no cache yet."""
        if isinstance(cache, (tuple, list)):
            raise CallError(
                f"past_key_values is a {type(cache).__name__}: pass transformers.DynamicCache(past_key_values), which"
                " takes (key, value) for each layer, and grows in place"
            )
        if is_empty(cache):
            if self.windows and cache is not None and cache.layers:
                check_windows(cache, self.windows)
            dtype = getattr(torch, self.cache_dtype)
            shapes = [(ids.shape[0], heads, 0, width) for heads, *widths in self.cache_heads for width in widths]
            return [torch.empty(shape, dtype=dtype, device=ids.device) for shape in shapes]
        return states_of(cache, len(self.cache_heads), self.windows)

    def _grown(self, call: Mapping[str, Any], states: Sequence[Tensor]) -> Any:
        """Put the grown keys and values into the caller's cache, as a Hugging Face model does; or into a new one."""
        cache = call.get("past_key_values")
        if cache is None:
            cache = windowed_cache(self.windows)
        grow(cache, states, self.windows, call["input_ids"].shape[1])
        return cache

    def check_default_positions(self) -> None:
        """That position_ids may be left out.

        Raises:
            CallError: the float model would count by a rule that is not known here.
        """
        if not self.default_positions:
            raise CallError(
                "position_ids is missing: the float model counts by a rule of its own, which the graph does not hold:"
                " pass [B, T] positions (generate() does)"
            )

    def _positions(self, given: Tensor | None, mask: Tensor, batch: int, query: int) -> Tensor:
        if given is not None:
            return given.expand(batch, query)
        self.check_default_positions()
        if self.positions_from_mask:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -query:]
        first = mask.shape[1] - query + self.first_position
        return torch.arange(first, first + query, dtype=torch.long, device=mask.device).expand(batch, query)


def guards_of(values: Mapping[str, Any], inputs: tuple[str, ...]) -> SizeGuards:
    """The guards that a saved calling convention has for a graph with these inputs, and the first key behind them.

    Raises:
        ValueError: they are damaged, or about other inputs.
    """
    guards = SizeGuards.from_list(values.get("guards", []))
    guards.validate([1 if name == "logits_to_keep" else 2 for name in inputs] + [4])
    return guards


def call_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call as {name: value}, refusing what no quantized causal LM takes."""
    call = dict(kwargs)
    for name, value in zip(PARAMETERS, args, strict=False):
        call[name] = value
    for name, value in call.items():
        # Nothing beyond the default is asked for by output_attentions=False or token_type_ids=None.
        if name not in UNDERSTOOD and value is not None and value is not DEFAULTS.get(name, False):
            raise CallError(f"argument {name!r} is not supported; a quantized causal LM takes {', '.join(PARAMETERS)}")
    return call


def input_ids_of(call: Mapping[str, Any]) -> Tensor:
    """The token ids [B, T] of a call whose other inputs are tensors too.

    Raises:
        CallError: they are missing, or no such tensors.
    """
    ids = call.get("input_ids")
    if ids is None:
        raise CallError("input_ids is missing: the traced graph starts at token ids, not at inputs_embeds")
    for name in ("input_ids", "attention_mask", "position_ids", "labels"):
        value = call.get(name)
        if value is not None and not isinstance(value, Tensor):
            raise CallError(f"{name} is a {type(value).__name__}: pass a tensor of [batch, length]")
    assert isinstance(ids, Tensor)
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise CallError(f"input_ids is a {ids.dtype} of {list(ids.shape)}: pass an int64 of [batch, length]")
    return ids


def refuse_packed(call: Mapping[str, Any]) -> None:
    """Refuse sequences packed into one row: without a mask and a cache the float model keeps them apart.

    Raises:
        CallError: position_ids start anew within a row.
    """
    positions = call.get("position_ids")
    cached = call.get("past_key_values") is not None or call.get("use_cache") is not False
    if positions is None or cached or positions.shape[-1] < 2:
        return
    message = (
        "position_ids do not count on within a row: without attention_mask and cache the float model takes it for"
        " several sequences, which the graph cannot keep apart: pass each as a row, padded, with attention_mask"
    )
    goes_on = (positions.diff(dim=-1) == 1).all()
    if torch.compiler.is_compiling():
        torch._assert_async(goes_on, message)
    elif not goes_on:
        raise CallError(message)


def kept_positions(kept: int | Tensor | None, query: int, device: torch.device) -> Tensor:
    """Positions whose logits are wanted: the last `kept` ones, all for 0 or None, or an index tensor as given."""
    if isinstance(kept, Tensor):
        return kept
    return torch.arange(max(0, query - kept) if kept else 0, query, dtype=torch.long, device=device)
