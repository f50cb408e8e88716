"""Where a Hugging Face model multiplies by constant weights, and how a packed product takes the place of a float one.

Linears are modules, and so are the convolutions that are meant, those whose windows share nothing. The weights of a
mixture's experts are stacks, parameters of the module that routes tokens to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.pytorch_utils import Conv1D

from lobcq_fx.integrations.experts import IMPLEMENTATION, STACKS, runs_experts
from lobcq_fx.kernels.bind import weight_layout
from lobcq_fx.modules.lobcq_convolution import LobcqConvolution
from lobcq_fx.modules.lobcq_grouped_linear import LobcqGroupedLinear
from lobcq_fx.modules.lobcq_linear import LobcqLinear
from lobcq_fx.modules.packed_product import LinearSettings, PackedProduct
from lobcq_fx.modules.windows import Windows, windows_of

LINEARS = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Place(ABC):
    """One weight of a model that has no packed product there yet.

    layer: what it is called, as `quantize` calls it.
    """

    model: PreTrainedModel
    layer: str

    @property
    @abstractmethod
    def weight(self) -> nn.Parameter:
        """The float weight, of a device and dtype, perhaps without content."""

    @property
    @abstractmethod
    def weight_name(self) -> str:
        """The parameter's name in the model."""

    @property
    @abstractmethod
    def biased(self) -> bool:
        """Whether the product itself adds a bias."""

    @property
    @abstractmethod
    def obstacle(self) -> str | None:
        """Why no packed product can stand here, whatever its settings; None where one can."""

    @abstractmethod
    def as_rows(self, weight: Tensor) -> Tensor:
        """A weight as it is stored here, as [N, K] or [E, N, K]."""

    @abstractmethod
    def replace(self, settings: LinearSettings) -> PackedProduct:
        """Put a packed product without content here."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K) or (E, N, K)."""
        return tuple(self.as_rows(self.weight).shape)

    @property
    def tied(self) -> bool:
        """Whether the weight is another one's too, by the model's configuration."""
        keys: dict[str, str] = self.model.all_tied_weights_keys
        return self.weight_name in keys or self.weight_name in keys.values()


class LinearPlace(Place):
    """A linear."""

    @property
    def _module(self) -> nn.Module:
        module: nn.Module = self.model.get_submodule(self.layer)
        return module

    @property
    def weight(self) -> nn.Parameter:
        """Its parameter."""
        return self._module.get_parameter("weight")

    @property
    def weight_name(self) -> str:
        """By the module's."""
        return f"{self.layer}.weight"

    @property
    def biased(self) -> bool:
        """It may be."""
        return self._module.bias is not None

    @property
    def obstacle(self) -> str | None:
        """A derived class may do more than multiply and add a bias."""
        name = type(self._module).__name__
        return None if type(self._module) in LINEARS else f"{name} is no plain linear"

    def as_rows(self, weight: Tensor) -> Tensor:
        """That of a `Conv1D` lies as [K, N]."""
        return weight.t() if isinstance(self._module, Conv1D) else weight

    def replace(self, settings: LinearSettings) -> LobcqLinear:
        """The packed linear takes the bias over."""
        weight, (rows, columns) = self.weight, self.shape
        bias: nn.Parameter | None = self._module.bias  # type: ignore[assignment]
        packed = LobcqLinear((rows, columns), bias, settings, weight_layout, dtype=weight.dtype, device=weight.device)
        _mark_initialized(packed)
        self.model.set_submodule(self.layer, packed)
        return packed


class ConvolutionPlace(LinearPlace):
    """A convolution whose windows share nothing."""

    @property
    def obstacle(self) -> str | None:
        """A derived class may do more, here too."""
        name = type(self._module).__name__
        return None if type(self._module) in CONVOLUTIONS else f"{name} is no plain convolution"

    def as_rows(self, weight: Tensor) -> Tensor:
        """A row for each channel of the result."""
        return weight.flatten(1)

    def replace(self, settings: LinearSettings) -> LobcqConvolution:
        """The packed convolution takes the bias over."""
        weight, (rows, columns), windows = self.weight, self.shape, _windows(self._module)
        assert isinstance(windows, Windows)
        bias: nn.Parameter | None = self._module.bias  # type: ignore[assignment]
        given = (rows, columns), bias, settings, weight_layout, windows
        packed = LobcqConvolution(*given, dtype=weight.dtype, device=weight.device)
        _mark_initialized(packed)
        self.model.set_submodule(self.layer, packed)
        return packed


class StackPlace(Place):
    """The weights of experts, of a module that transformers lets run by functions that others register."""

    @property
    def _experts(self) -> nn.Module:
        module: nn.Module = self.model.get_submodule(self.layer.rpartition(".")[0])
        return module

    @property
    def weight(self) -> nn.Parameter:
        """Its parameter."""
        parameter: nn.Parameter = self.model.get_parameter(self.layer)
        return parameter

    @property
    def weight_name(self) -> str:
        """The layer's: it is no module."""
        return self.layer

    @property
    def biased(self) -> bool:
        """The experts' biases are added by what routes."""
        return False

    @property
    def obstacle(self) -> str | None:
        """Some experts run in a way of their own."""
        if runs_experts(self._experts):
            return None
        return f"{type(self._experts).__name__} runs its experts in a way of its own"

    def as_rows(self, weight: Tensor) -> Tensor:
        """Some lie as [E, K, N]."""
        return weight.mT if getattr(self._experts, "is_transposed", False) else weight

    def replace(self, settings: LinearSettings) -> LobcqGroupedLinear:
        """The packed stack takes the name of the parameter."""
        experts, name, (count, rows, columns) = self._experts, self.layer.rpartition(".")[2], self.shape
        dtype, device = self.weight.dtype, self.weight.device
        packed = LobcqGroupedLinear((count, rows, columns), settings, weight_layout, dtype=dtype, device=device)
        _mark_initialized(packed)
        setattr(experts, "_is_hf_initialized", True)  # noqa: B010  (transformers would fill its weights)
        delattr(experts, name)
        setattr(experts, name, packed)
        return packed


def places(model: PreTrainedModel) -> Iterator[Place]:
    """Every weight that could be packed."""
    for name, module in model.named_modules():
        if isinstance(module, LINEARS):
            yield LinearPlace(model, name)
        elif isinstance(module, CONVOLUTIONS) and isinstance(_windows(module), Windows):
            yield ConvolutionPlace(model, name)
        for stack in STACKS:
            if isinstance(module._parameters.get(stack), nn.Parameter) and module._parameters[stack].dim() == 3:
                yield StackPlace(model, f"{name}.{stack}" if name else stack)


def _windows(module: Any) -> Windows | str:
    """The windows of a convolution, or why it is no matmul."""
    return windows_of(module.kernel_size, module.stride, module.padding, module.dilation, module.groups)


def settle(model: PreTrainedModel) -> None:
    """Once all weights are read: packed experts are run by ours, and packed weights are saved as they are.

    transformers takes the weights of some classes apart again when it saves them, which packed ones cannot be.
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, PackedProduct):
            module.prepack()
            names.append(name if module.packed.stack else f"{name}.weight")
        if any(isinstance(getattr(module, stack, None), LobcqGroupedLinear) for stack in STACKS):
            module.config._experts_implementation = IMPLEMENTATION
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [one for one in conversions if not _concerns(one, names)]


def _concerns(conversion: WeightTransform, names: list[str]) -> bool:
    """Whether a conversion made one of the named weights out of others, not merely a name for it."""
    if not isinstance(conversion, WeightConverter):
        return False
    back = conversion.reverse_transform()
    return any(back.rename_source_key(name)[1] is not None for name in names)


def _mark_initialized(packed: PackedProduct) -> None:
    """Keep transformers from writing random numbers into what it finds no parameter for."""
    for module in packed.modules():
        setattr(module, "_is_hf_initialized", True)  # noqa: B010  (no attribute that mypy knows)
