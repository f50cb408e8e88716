"""LO-BCQ as one of transformers' quantization methods: `from_pretrained` gives the original class with packed linears.

It is imported while transformers is, so that all which needs the whole of transformers is imported when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import __version__
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CalibrationError, CheckpointError, ConfigError
from lobcq_fx.modules.packed_product import LinearSettings
from lobcq_fx.storage.checkpoint import FORMAT_VERSION, LAYERS, NOTICE_START, QUANT_METHOD, check_version
from lobcq_fx.storage.shards import WEIGHTS
from lobcq_fx.storage.stored_tensors import check_entry


@register_quantization_config(QUANT_METHOD)
class LobcqQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The settings, as transformers passes them around: `from_pretrained(folder, quantization_config=...)`.

    Args:
        lobcq_config: what to quantize and how; None means the defaults. What needs calibration data is refused.
        layers: how each layer of a saved model computes, by name; written by `save_pretrained`.
        format_version: of the folder that it comes from.
        weights: the file that leads to its tensors, where it has a graph; written by `QuantizedModel.save_pretrained`.
        quant_method: always "lobcq".

    Raises:
        ConfigError: a bad setting. CheckpointError: a folder of a version that this release does not read.
    """

    def __init__(
        self,
        lobcq_config: LobcqConfig | Mapping[str, Any] | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        weights: str = WEIGHTS,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        check_version("quantization_config", {"quant_method": quant_method, "format_version": format_version})
        self.quant_method = quant_method
        self.weights = check_entry("quantization_config", weights)
        given = lobcq_config or {}
        self.lobcq_config = given if isinstance(given, LobcqConfig) else LobcqConfig.from_dict(given)
        try:
            self.layers = None if layers is None else {k: LinearSettings.from_dict(one) for k, one in layers.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"{LAYERS} of a quantization_config: {type(error).__name__}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, for config.json."""
        values = {
            "quant_method": self.quant_method,
            "format_version": FORMAT_VERSION,
            "lobcq_config": self.lobcq_config.to_dict(),
        }
        layers = None if self.layers is None else {name: one.to_dict() for name, one in self.layers.items()}
        return values if layers is None else {**values, LAYERS: layers}


@register_quantizer(QUANT_METHOD)
class LobcqHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed linears and experts in the place of float ones: of a saved model, or as a float one is read."""

    quantization_config: LobcqQuantizationConfig
    requires_calibration = False

    def __init__(self, quantization_config: LobcqQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(deepcopy(quantization_config), **kwargs)  # it gets the layers of one model

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Refuse what a float model cannot be given as it is read.

        Raises:
            CalibrationError: settings that need data. ConfigError: weights left on disk; a cache in LO-BCQ, which
                no class of transformers makes by itself.
        """
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ConfigError(f"device_map={dict(device_map)!r}: packed weights are not left on disk; use 'cpu' there")
        config = self.quantization_config.lobcq_config
        if config.kv_cache is not None:
            name = config.kv_cache.name
            raise ConfigError(
                f"kv_cache={name!r}: this class makes its caches itself, of floats. Remedy: lobcq_fx.load(folder); or"
                f" leave kv_cache out of the settings, and pass past_key_values=lobcq_fx.LobcqCache({name!r})"
            )
        if not self.pre_quantized and config.needs_calibration:
            raise CalibrationError(
                f"{', '.join(config.calibrated)} need calibration data, and from_pretrained has none. Remedy: load the"
                " float model, call lobcq_fx.quantize(model, calibration_data, config), and save what it returns"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """The one call that sees the configuration before the weights are looked for: say in which file they are."""
        if str(getattr(config, "transformers_weights", None)).startswith(NOTICE_START):
            config.transformers_weights = self.quantization_config.weights
        return config

    update_tp_plan = update_attn_implementation  # the one call of older releases

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from lobcq_fx.integrations.encode_as_read import EncodedAsRead
        from lobcq_fx.integrations.packed_as_read import GraphFolder, ModuleFolder

        settings = self.quantization_config
        if not self.pre_quantized:
            self._reading: Any = EncodedAsRead(settings.lobcq_config)
        elif settings.layers is not None:
            self._reading = ModuleFolder(settings.layers)
        elif checkpoint_files:
            self._reading = GraphFolder([Path(file) for file in checkpoint_files])
        else:
            raise CheckpointError(f"a LO-BCQ model is read from its folder: pass that to {type(model).__name__}")
        self._reading.prepare(model)
        self._divided = self._divide(model)

    def _divide(self, model: Any) -> bool:
        """Whether several ranks are to share the model, which is then prepared for it.

        Raises:
            ConfigError: they cannot.
        """
        config = getattr(model.config, "distributed_config", None)
        sizes = ("tp_size", "fsdp_size", "dp_replicate_size", "pp_size", "ep_size")
        if all((getattr(config, name, None) or 1) == 1 for name in sizes):
            return False
        if not hasattr(model, "_resolve_parallel_plans"):
            raise ConfigError(
                f"transformers {__version__} does not let packed weights be divided among ranks. Remedy: 5.23 or later,"
                " or one rank"
            )
        if not self.pre_quantized:
            raise ConfigError(
                "weights are encoded as they are read by one rank alone: the tensor scale is of the whole matrix."
                " Remedy: lobcq_fx.quantize_folder(folder, output) once, and from_pretrained(output, tp_plan='auto')"
            )
        from lobcq_fx.integrations.parallel_styles import divide_packed

        divide_packed(model)
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether a float weight is to be encoded when it arrives."""
        return not self.pre_quantized and self._reading.encodes(param_name)

    def get_quantize_ops(self) -> Any:
        """What encodes it."""
        return self._reading

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self._divided:
            from lobcq_fx.integrations.parallel_styles import hold_parts

            hold_parts(model)
        self.quantization_config.layers = self._reading.finish(model)
        del self._reading  # and the tensors that it holds
        return model.requires_grad_(False)  # what is beside packed weights was made to fit them

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        """The one call that sees a model that is to be saved.

        Raises:
            ConfigError: this rank has a part of it.
        """
        if self._divided:
            raise ConfigError("a rank has a part of the packed weights. Remedy: copy the folder that it was read from")
        return None, {}

    def is_serializable(self) -> bool:
        """`save_pretrained` writes a folder that `from_pretrained` opens."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are: activations have gradients, packed weights have none."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate()` may compile the forward."""
        return True
