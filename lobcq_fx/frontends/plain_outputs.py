"""A model's configuration says what its outputs are; while it is traced, they are the plain ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

EXTRA_OUTPUTS = frozenset({"output_hidden_states", "_output_attentions", "output_router_logits"})
"""Settings that add outputs; the second has a setter that refuses what the attention in use cannot return."""

FORM = frozenset({"use_cache", "return_dict"})
"""Settings that take outputs away, or their names."""


PLAIN: Mapping[str, bool] = dict.fromkeys(EXTRA_OUTPUTS, False) | dict.fromkeys(FORM, True)


@contextmanager
def plain_outputs(model: PreTrainedModel, settings: Collection[str] = PLAIN.keys()) -> Iterator[None]:
    """Within, the model returns logits and cache by name unless a call asks for something else.

    Args:
        model: its configurations are as they were afterwards.
        settings: which of them to make plain.
    """
    saved = []
    for config in configurations(model):
        values = vars(config)
        names = values.keys() & settings
        saved.append((values, {name: values[name] for name in names}))
        values.update({name: PLAIN[name] for name in names})
    try:
        yield
    finally:
        for values, before in saved:
            values.update(before)


def without_extra_outputs(config: Any) -> None:
    """Make a configuration say what a quantized causal language model returns."""
    for one in _nested(config):
        vars(one).update(dict.fromkeys(EXTRA_OUTPUTS & vars(one).keys(), False))


def configurations(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every configuration that a part of the model reads."""
    owned = (getattr(module, "config", None) for module in model.modules())
    found = {id(one): one for config in owned if isinstance(config, PreTrainedConfig) for one in _nested(config)}
    return list(found.values())


def _nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _nested(value)
