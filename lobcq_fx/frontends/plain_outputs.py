"""A model's configuration says what its outputs are; while it is traced, they are the plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

EXTRA_OUTPUTS = frozenset({"output_hidden_states", "_output_attentions", "output_router_logits"})
"""Settings that add outputs; the second has a setter that refuses what the attention in use cannot return."""

FORM = frozenset({"use_cache", "return_dict"})
"""Settings that take outputs away, or their names."""


@contextmanager
def plain_outputs(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model returns logits and cache by name unless a call asks for something else."""
    saved = []
    for config in _configs(model):
        values = vars(config)
        saved.append((values, {name: values[name] for name in (EXTRA_OUTPUTS | FORM) & values.keys()}))
        values.update(dict.fromkeys(EXTRA_OUTPUTS & values.keys(), False))
        values.update(dict.fromkeys(FORM & values.keys(), True))
    try:
        yield
    finally:
        for values, before in saved:
            values.update(before)


def without_extra_outputs(config: Any) -> None:
    """Make a configuration say what a quantized causal language model returns."""
    for one in _nested(config):
        vars(one).update(dict.fromkeys(EXTRA_OUTPUTS & vars(one).keys(), False))


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every configuration that a part of the model reads."""
    owned = (getattr(module, "config", None) for module in model.modules())
    found = {id(one): one for config in owned if isinstance(config, PreTrainedConfig) for one in _nested(config)}
    return list(found.values())


def _nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _nested(value)
