"""The output classes of transformers, by the names that saved models have for them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Set as AbstractSet
from dataclasses import is_dataclass
from types import ModuleType

from transformers import modeling_outputs
from transformers.utils import ModelOutput

from lobcq_fx.errors import TraceError
from lobcq_fx.tracing.structure import type_names

COMMON = "transformers.modeling_outputs"

HOMES = re.compile(r"transformers\.modeling_outputs|transformers\.models\.[a-z0-9_]+\.modeling_[a-z0-9_]+")
"""The only modules that are imported because a saved model names them: those in which transformers defines models."""

CACHE_NAME = "cache" if "cache" in modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the cache in the models' arguments and outputs: `cache` from 5.24 on."""

CACHE_PARAMS = "cache_params"
"""What models without attention call it."""

RETURNED = frozenset({"loss", "logits", CACHE_NAME, CACHE_PARAMS})
"""What a quantized causal language model returns; of the two names of a cache one."""


def cache_field(kind: type[ModelOutput]) -> str:
    """The field that an output class of a causal language model has for its cache.

    Raises:
        ValueError: it has none, or none for a loss or logits.
    """
    names = kind.__dataclass_fields__.keys()
    found = next((name for name in (CACHE_NAME, CACHE_PARAMS) if name in names), None)
    if found is None or not {"loss", "logits"} <= names:
        raise ValueError(f"{kind.__name__} has no field for a loss, logits or a cache")
    return found


LAST_HIDDEN_STATE = "encoder_last_hidden_state"

RETURNED_OF_SEQ2SEQ = frozenset({"loss", "logits", CACHE_NAME, LAST_HIDDEN_STATE})
"""What a quantized encoder-decoder returns."""


def output_type(name: str) -> type[ModelOutput]:
    """The class of a name: one of `transformers.modeling_outputs`, or one of a model's module in full.

    Raises:
        ValueError: it names no output class of transformers.
    """
    home, _, last = name.rpartition(".")
    found = getattr(_module(home or COMMON), last, None)
    if not (isinstance(found, type) and issubclass(found, ModelOutput) and is_dataclass(found)):
        raise ValueError(f"output_type is {name!r}, no output class of transformers")
    return found


def language_model_output_name(model: str, output: object, besides: AbstractSet[str] = frozenset()) -> str:
    """What `output_type` finds a float model's output class by.

    Args:
        model: the class's name, for errors.
        output: what the model returned.
        besides: fields that its quantized model returns beside a loss, logits and a cache.

    Raises:
        TraceError: a quantized language model cannot return such outputs, or would lose some of them.
    """
    kind = type(output)
    remedy = "Remedy: wrap it in a torch.nn.Module that returns what you need, and quantize that with example_inputs"
    home = "" if kind.__module__ == COMMON else f"{kind.__module__}."
    name = f"{home}{kind.__name__}"
    try:
        if not isinstance(output, ModelOutput) or besides - getattr(kind, "__dataclass_fields__", {}).keys():
            raise ValueError
        cache_field(kind)
    except ValueError:
        raise TraceError(f"{model} returns a {name}, not logits and a cache by name. {remedy}") from None
    extra = [key for key in output if key not in RETURNED | besides]
    if extra:
        raise TraceError(f"{model} returns {', '.join(extra)} besides logits and cache, which would be lost. {remedy}")
    try:
        output_type(name)
    except ValueError:
        raise TraceError(
            f"{model} returns a {name}; saved models may name output classes of transformers alone. {remedy}"
        ) from None
    return name


def import_output_types(structure: str) -> None:
    """Import what a saved structure of outputs names: classes of transformers register themselves when imported.

    Raises:
        ValueError: one is no output class of transformers, or cannot be imported.
    """
    for name in type_names(structure):
        if name.startswith("transformers."):
            output_type(name)


def _module(name: str) -> ModuleType | None:
    """A module that defines output classes; None for a name of anything else, which is not imported.

    Raises:
        ValueError: it cannot be imported.
    """
    if not HOMES.fullmatch(name):
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name}, which defines the model's outputs, cannot be imported: {error}") from None
