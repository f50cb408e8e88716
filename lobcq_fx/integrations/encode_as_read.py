"""`from_pretrained` of a float model: weights are encoded one by one as they are read, by the rules of `quantize`."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from lobcq_fx import selection
from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.codebook_choice import given_codebooks
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CheckpointError, ConfigError
from lobcq_fx.frontends.roles import roles_of
from lobcq_fx.integrations.linear_places import (
    LINEARS,
    as_rows,
    is_linear,
    mark_initialized,
    replace_linear,
    shape_of,
    tied,
)
from lobcq_fx.modules.lobcq_linear import LinearSettings, LobcqLinear
from lobcq_fx.modules.packed_weight import PackedWeight

logger = logging.getLogger(__name__)


class EncodedAsRead(ConversionOps):  # type: ignore[misc]
    """Chooses the layers, and is the operation that transformers calls with the weights of those.

    config: settings that need no data.
    """

    codebooks: CodebookSets

    def __init__(self, config: LobcqConfig) -> None:
        self.config = config
        self.layers: dict[str, LinearSettings] = {}

    def prepare(self, model: PreTrainedModel) -> None:
        """Decide for each linear of a model that has no tensors yet.

        Raises:
            ConfigError: the settings leave nothing to quantize, or choose a weight that is another one's too.
        """
        roles, reasons = roles_of(model), {}
        for name, module in model.named_modules():
            if not isinstance(module, LINEARS):
                continue
            settings = self.config.for_layer(name, roles.get(name))
            reason = selection.refusal(name, shape_of(module), module.weight.dtype, settings, roles.get(name))
            if reason is None and not is_linear(module):
                reason = f"{type(module).__name__} is no plain linear: lobcq_fx.quantize(model) looks into it"
            if reason is not None:
                reasons[name] = reason
                logger.info("%s stays in float: %s", name, reason)
                continue
            if tied(model, f"{name}.weight"):
                raise ConfigError(
                    f"{name}.weight is the embedding's too, which stays in float. Remedy: exclude the layer, or call"
                    " lobcq_fx.quantize(model), which keeps both"
                )
            self.layers[name] = LinearSettings(settings.format, settings.mode, settings.activations)
        if not self.layers:
            found = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise ConfigError(f"nothing to quantize in {type(model).__name__}: {found or 'it has no linears'}")
        formats = {spec for one in self.layers.values() for spec in (one.spec, one.activations)}
        self.codebooks = given_codebooks(self.config, formats)

    def encodes(self, parameter: str) -> bool:
        """Whether a parameter is the weight of a chosen layer."""
        return parameter.removesuffix(".weight") in self.layers and parameter.endswith(".weight")

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, missing_keys: set[str], **_: Any
    ) -> dict[str, Tensor]:
        """Encode the weights of chosen layers; the rest goes back to transformers.

        Raises:
            LobcqError: a weight holds NaN or infinity.
        """
        left = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if self.encodes(name):
                self._encode(model, name.removesuffix(".weight"), tensor)
                missing_keys.discard(name)
            else:
                left[name] = tensor
        return left

    def _encode(self, model: PreTrainedModel, layer: str, weight: Tensor) -> None:
        settings, rows = self.layers[layer], as_rows(model.get_submodule(layer), weight)
        codebooks = self.codebooks.weights[settings.spec]
        encoded = encode_weight(rows, settings.spec, codebooks, f"{layer}.weight")
        linear = replace_linear(model, layer, settings)
        linear.weight = PackedWeight(encoded)
        mark_initialized(linear)
        linear.codebooks = codebooks.to(weight.device, copy=True)
        if linear.activation_codebooks is not None:
            linear.activation_codebooks = self.codebooks.activations[settings.activations].to(weight.device, copy=True)

    def finish(self, model: PreTrainedModel) -> dict[str, LinearSettings]:
        """Lay the weights out for the kernels.

        Raises:
            CheckpointError: a weight never came.
        """
        for name in self.layers:
            linear = model.get_submodule(name)
            if not isinstance(linear, LobcqLinear):
                raise CheckpointError(
                    f"the folder has no {name}.weight of its own to encode. Remedy: exclude the layer, or load the"
                    " float model and call lobcq_fx.quantize(model)"
                )
            linear.prepack()
        return self.layers
