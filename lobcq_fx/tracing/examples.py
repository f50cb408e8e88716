"""One model input, as calibration data or an example have it, as a call of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lobcq_fx.errors import CallError
from lobcq_fx.tracing.calling import CallingConvention, ModuleCall, plain


def call_of(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of one model input: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.

    Raises:
        CallError: it holds no tensor.
    """
    _check_tensors(item)
    if isinstance(item, Mapping):
        return (), {str(name): plain(value) for name, value in item.items()}
    if isinstance(item, (tuple, list)):
        return tuple(plain(value) for value in item), {}
    return (item,), {}


def without_labels(item: Any) -> Any:
    """A model input without what only a loss needs: quantized models are not trained."""
    if not isinstance(item, Mapping):
        return item
    return {name: value for name, value in item.items() if not is_label(name)}


def is_label(argument: str) -> bool:
    """Whether transformers takes an argument for a loss alone."""
    return "label" in argument or argument in ("start_positions", "end_positions")


def calibration_inputs(calling: CallingConvention, item: Any, device: torch.device) -> list[Tensor]:
    """A graph's inputs for one item of calibration data; labels count only where the graph was traced with them.

    Raises:
        CallError: the graph cannot serve the call.
    """
    args, kwargs = call_of(item)
    if isinstance(calling, ModuleCall):
        traced = calling.inputs.spec.context
        kwargs = {name: value for name, value in kwargs.items() if name in traced or not is_label(name)}
    return [value.to(device) for value in calling.flatten(args, kwargs)]


def _check_tensors(item: Any) -> None:
    values = list(item.values()) if isinstance(item, Mapping) else item
    leaves = pytree.tree_leaves(pytree.tree_map(plain, values))
    if any(isinstance(leaf, Tensor) for leaf in leaves):
        return
    kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves})) or "nothing"
    if any(isinstance(leaf, str) for leaf in leaves):
        remedy = "text: tokenize it first, for example tokenizer(text, return_tensors='pt')"
    else:
        remedy = (
            f"{kinds}: make tensors of it first, for example {{'input_ids': torch.tensor([row])}} of [batch, length]"
        )
    raise CallError(f"a model input is a {type(item).__name__} that holds no tensor, but {remedy}")
