"""`from_pretrained` of a float model: weights are encoded one by one as they are read, by the rules of `quantize`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from lobcq_fx import selection
from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.calibration.encode_weight import encode_stacked_weight, encode_weight
from lobcq_fx.codebook_choice import given_codebooks
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CheckpointError, ConfigError
from lobcq_fx.frontends.roles import roles_of
from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.integrations.experts import STACKS
from lobcq_fx.integrations.places import Place, StackPlace, places, settle
from lobcq_fx.modules.packed_product import LinearSettings, PackedProduct
from lobcq_fx.modules.packed_weight import PARTS

logger = logging.getLogger(__name__)


class EncodedAsRead(ConversionOps):  # type: ignore[misc]
    """Chooses the layers, and is the operation that transformers calls with the weights of those.

    config: settings that need no data.
    """

    codebooks: CodebookSets

    def __init__(self, config: LobcqConfig) -> None:
        self.config = config
        self.layers: dict[str, LinearSettings] = {}
        self._places: dict[str, Place] = {}  # by the names of parameters

    def prepare(self, model: PreTrainedModel) -> None:
        """Decide for each weight of a model that has no tensors yet.

        Raises:
            ConfigError: the settings leave nothing to quantize, choose a weight that is another one's too, or one of
                the experts' stacks without the other.
        """
        roles, reasons = roles_of(model), {}
        for place in places(model):
            name, weight = place.layer, place.weight
            settings = self.config.for_layer(name, roles.get(name))
            reason = selection.refusal(name, place.shape, weight.dtype, settings, roles.get(name))
            if reason is None and place.obstacle is not None:
                reason = f"{place.obstacle}: lobcq_fx.quantize(model) looks into it"
                if isinstance(place, StackPlace):  # most of such a model
                    logger.warning("%s stays in float: %s", name, reason)
            if reason is not None:
                reasons[name] = reason
                logger.info("%s stays in float: %s", name, reason)
                continue
            if place.tied:
                raise ConfigError(
                    f"{place.weight_name} is the embedding's too, which stays in float. Remedy: exclude the layer, or"
                    " call lobcq_fx.quantize(model), which keeps both"
                )
            self.layers[name] = LinearSettings(settings.format, settings.mode, settings.activations)
            self._places[place.weight_name] = place
        if not self.layers:
            found = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise ConfigError(f"nothing to quantize in {type(model).__name__}: {found or 'it has no linears'}")
        _check_pairs([one for one in self._places.values() if isinstance(one, StackPlace)], reasons)
        formats = {spec for one in self.layers.values() for spec in (one.spec, one.activations)}
        self.codebooks = given_codebooks(self.config, formats)

    def encodes(self, parameter: str) -> bool:
        """Whether a parameter is the weight of a chosen layer."""
        return parameter in self._places

    def convert(self, input_dict: dict[str, Any], *, missing_keys: set[str], **_: Any) -> dict[str, Tensor]:
        """Encode the weights of chosen layers; the rest goes back to transformers.

        Raises:
            LobcqError: a weight holds NaN or infinity.
        """
        left = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if self.encodes(name):
                self._encode(self._places[name], tensor)
                missing_keys.discard(name)
            else:
                left[name] = tensor
        return left

    def _encode(self, place: Place, weight: Tensor) -> None:
        settings, rows = self.layers[place.layer], place.as_rows(weight)
        codebooks = self.codebooks.weights[settings.spec]
        encode = encode_stacked_weight if rows.dim() == 3 else encode_weight
        encoded = encode(rows, settings.spec, codebooks, place.weight_name)
        packed = place.replace(settings)
        for part in PARTS:
            setattr(packed.packed, part, getattr(encoded, part))
        packed.codebooks = codebooks.to(weight.device, copy=True)
        if packed.activation_codebooks is not None:
            packed.activation_codebooks = self.codebooks.activations[settings.activations].to(weight.device, copy=True)

    def finish(self, model: PreTrainedModel) -> dict[str, LinearSettings]:
        """Lay the weights out for the kernels.

        Raises:
            CheckpointError: a weight never came.
        """
        for name, place in self._places.items():
            packed = get_attribute(model, place.layer)
            if not isinstance(packed, PackedProduct):
                raise CheckpointError(
                    f"the folder has no {name} of its own to encode. Remedy: exclude the layer, or load the float model"
                    " and call lobcq_fx.quantize(model)"
                )
        settle(model)
        return self.layers


def _check_pairs(stacks: list[StackPlace], reasons: Mapping[str, str]) -> None:
    """That experts have all their stacks packed: what multiplies by them takes no other.

    Raises:
        ConfigError: names the stack that is left, and why.
    """
    for one in stacks:
        owner = one.layer.rpartition(".")[0]
        for name in STACKS:
            left = f"{owner}.{name}"
            if left in reasons:
                raise ConfigError(
                    f"{one.layer} would be packed without {left} ({reasons[left]}). Remedy: include both or exclude"
                    " both, or call lobcq_fx.quantize(model), which takes either"
                )
