"""transformers' own loading of a checkpoint, with every parameter taken out of its hands as it comes.

Names, merged and split tensors, dtypes, ties and what no file holds are transformers' business: this calls
`from_pretrained` with tensors that are read when they are needed, and with a quantization method that gets each
parameter once it is made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lobcq_fx.errors import CheckpointError
from lobcq_fx.streaming.float_folder import FloatFolder

METHOD = "lobcq_streaming"

Read = Callable[[str], Tensor]
"""The content of a stored tensor, by its name in the folder."""

Take = Callable[[PreTrainedModel, Mapping[str, Tensor]], dict[str, Tensor]]
"""Gets parameters as the model would have them, by their names in it; returns what it is to have, if anything."""


def model_class_of(config: Mapping[str, Any]) -> Any:
    """The class of transformers that a configuration, as JSON values, names; its automatic one where it names none.

    Raises:
        CheckpointError: there is no such class.
    """
    if not config.get("architectures"):
        return transformers.AutoModel
    architecture = str(config["architectures"][0])
    found = getattr(transformers, architecture, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    raise CheckpointError(
        f"unsupported architecture {architecture}: transformers {transformers.__version__} has no such class"
        " (models that bring their own code are not supported)"
    )


def load_through(
    folder: FloatFolder, dtype: torch.dtype | str, read: Read, take: Take
) -> tuple[PreTrainedModel, list[str]]:
    """What `from_pretrained(folder)` makes, with the parameters that `take` returns; and which it has no tensors for.

    Args:
        folder: the checkpoint.
        dtype: as `from_pretrained` takes it.
        read: called for the tensors of a parameter right before `take` is called for it.
        take: called for each parameter of the model's dtype, in transformers' order.

    Raises:
        CheckpointError: the folder's model is unknown, or not to be read like this.
    """
    _check(folder)
    model_class = model_class_of(folder.config)
    ours: list[Exception] = []
    stored = {name: _Stored(folder, name, read, ours) for name in folder}
    try:
        config = _config(model_class, folder.path)
        if model_class is transformers.AutoModel:
            model_class = transformers.MODEL_MAPPING[type(config)]
        settings = {"dtype": dtype, "quantization_config": _Settings(_Taken(take, ours)), "output_loading_info": True}
        model, found = model_class.from_pretrained(None, config=config, state_dict=stored, **settings)
    except MemoryError:
        raise
    except Exception as error:  # of many kinds: transformers' own are about what is in the folder
        if ours:
            raise ours[0] from None
        text = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"cannot load {folder.path} ({model_class.__name__}): {text}") from error
    model.hf_quantizer.remove_quantization_config(model)
    model.config.name_or_path = folder.path
    if model.can_generate():
        _read_generation_config(model, folder.path)
    return model, sorted(found["missing_keys"])


@dataclass(frozen=True)
class _Stored:
    """A tensor of the folder as transformers takes one that is not read yet: `[...]` reads it."""

    folder: FloatFolder
    name: str
    read: Read
    errors: list[Exception]

    def __getitem__(self, index: Any) -> Tensor:
        with _noted(self.errors):
            return self.read(self.name)[index]

    @property
    def dtype(self) -> torch.dtype:
        return self.folder.dtype(self.name)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


class _Taken(ConversionOps):  # type: ignore[misc]
    """The operation that transformers calls with the tensors of a parameter in the place of quantizing them."""

    def __init__(self, take: Take, errors: list[Exception]) -> None:
        self.take, self.errors = take, errors

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, missing_keys: set[str], **_: Any
    ) -> dict[str, Tensor]:
        """Hand the parameters on."""
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        missing_keys.difference_update(tensors)
        with _noted(self.errors):
            return self.take(model, tensors)


@contextmanager
def _noted(errors: list[Exception]) -> Iterator[None]:
    """Keep an error, for which transformers may raise one of its own at the end."""
    try:
        yield
    except Exception as error:
        errors.append(error)
        raise


@register_quantization_config(METHOD)
class _Settings(QuantizationConfigMixin):  # type: ignore[misc]
    """What carries the operation through `from_pretrained`."""

    def __init__(self, taken: _Taken | None = None, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method
        self.taken = taken

    def __deepcopy__(self, memo: Any) -> _Settings:
        return self

    def to_dict(self) -> dict[str, Any]:
        """For configurations that are made of the model's while it is built."""
        return {"quant_method": self.quant_method}


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Takes the parameters of the dtype that the model is loaded in; transformers casts others by rules of its own."""

    requires_calibration = False

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype, **keywords: Any) -> None:
        """Note the dtype."""
        self._dtype = dtype
        super().preprocess_model(model, dtype=dtype, **keywords)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether it is taken."""
        parameter = model.get_parameter_or_buffer(param_name)
        parameter._is_hf_initialized = True  # else transformers would fill what has no memory
        return bool(parameter.dtype == self._dtype)

    def get_quantize_ops(self) -> Any:
        """What takes it."""
        return self.quantization_config.taken

    def is_serializable(self) -> bool:
        """Nothing is saved through it."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Nor trained."""
        return False


def _check(folder: FloatFolder) -> None:
    method = (folder.config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise CheckpointError(f"{folder.path} is quantized already, by {method!r}: pass the folder of the float model")
    if (folder.path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder.path} has an adapter, which is read with a whole model. Remedy: merge it, and save the model"
        )


def _config(model_class: Any, path: Path) -> Any:
    config_class = getattr(model_class, "config_class", None) or transformers.AutoConfig
    return config_class.from_pretrained(path, local_files_only=True)


def _read_generation_config(model: PreTrainedModel, path: Path) -> None:
    """As `from_pretrained` does it for a folder."""
    download = {"cache_dir": None, "force_download": False, "proxies": None, "token": None, "revision": None}
    model.adjust_generation_fn(
        None, False, False, path, local_files_only=True, subfolder="", trust_remote_code=None, **download
    )
