"""The linears of a Hugging Face model: which modules they are, and how a packed one takes the place of a float one."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.modules.lobcq_linear import LinearSettings, LobcqLinear

LINEARS = (nn.Linear, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight, and does nothing else but add a bias; a derived class may do more."""
    return type(module) in LINEARS


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(N, K) of the weight."""
    rows, columns = as_rows(linear, linear.get_parameter("weight")).shape
    return rows, columns


def as_rows(linear: nn.Module, weight: Tensor) -> Tensor:
    """A weight of a linear as [N, K]; that of a `Conv1D` lies as [K, N]."""
    return weight.t() if isinstance(linear, Conv1D) else weight


def replace_linear(model: PreTrainedModel, name: str, settings: LinearSettings) -> LobcqLinear:
    """Put a packed linear without content in the place of a float one, whose bias it takes over."""
    linear = model.get_submodule(name)
    dtype, device = linear.weight.dtype, linear.weight.device
    packed = LobcqLinear(shape_of(linear), linear.bias, settings, weight_layout, dtype=dtype, device=device)
    mark_initialized(packed)
    model.set_submodule(name, packed)
    return packed


def mark_initialized(linear: LobcqLinear) -> None:
    """Keep transformers from writing random numbers into what it finds no parameter for."""
    for module in linear.modules():
        setattr(module, "_is_hf_initialized", True)  # noqa: B010  (no attribute that mypy knows)


def tied(model: PreTrainedModel, weight: str) -> bool:
    """Whether a weight is another one's too, by the model's configuration."""
    keys: dict[str, str] = model.all_tied_weights_keys
    return weight in keys or weight in keys.values()
