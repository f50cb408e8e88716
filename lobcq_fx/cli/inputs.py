"""What commands are given: model folders, tokenizers and text files, checked before any long work starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

import lobcq_fx
from lobcq_fx.cli.failures import InputError
from lobcq_fx.errors import LobcqError
from lobcq_fx.evaluation.data_files import whole_text
from lobcq_fx.storage.checkpoint import QUANT_METHOD
from lobcq_fx.streaming.transformers_loading import model_class_of

DEFAULT = "default"
"""What stands for the folder of the embedded model on the command line."""

HELDOUT = "heldout.txt"


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a model: its path, its configuration as JSON values, and whether this package wrote it."""

    path: Path
    config: dict[str, Any]
    quantized: bool

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return str((self.config.get("architectures") or ["unknown"])[0])

    @property
    def is_causal_lm(self) -> bool:
        """Whether the model predicts next tokens."""
        return self.architecture.endswith(("ForCausalLM", "LMHeadModel"))

    @property
    def is_text_to_text(self) -> bool:
        """Whether the model answers a text that its encoder reads."""
        return self.architecture in _names(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)

    @property
    def is_encoder_decoder(self) -> bool:
        """The same, or a recording."""
        return self.is_text_to_text or self.architecture in _names(MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)

    @property
    def takes_images(self) -> bool:
        """Whether the model continues a prompt that has images in it."""
        elsewhere = self.is_causal_lm or self.is_text_to_text or self.config.get("is_encoder_decoder")
        return not elsewhere and self.architecture in _names(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

    @property
    def generates_text(self) -> bool:
        """Whether the model continues or answers a text."""
        return self.is_causal_lm or self.is_text_to_text or self.takes_images

    @property
    def max_length(self) -> int | None:
        """Tokens that the model can take at once, where its configuration says so."""
        length = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        return int(length) if length else None


def model_folder(given: str) -> ModelFolder:
    """The folder someone named, or the embedded model's for `"default"`.

    Raises:
        InputError: no such folder, or no model in it.
    """
    path = lobcq_fx.default_model_path() if given == DEFAULT else Path(given).expanduser()
    if not path.is_dir():
        raise InputError(
            f"there is no folder {given!r}: pass a model's folder (`hf download ORG/NAME --local-dir DIR`),"
            f" or {DEFAULT!r} for the embedded model"
        )
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is not a model: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a model: cannot read {file.name}: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a model: {file.name} holds no JSON object")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, QUANT_METHOD):
        raise InputError(f"{path} is already quantized by {method!r}: pass the folder of the float model")
    return ModelFolder(path, config, quantized=method == QUANT_METHOD)


def causal_lm_folder(given: str) -> ModelFolder:
    """The same of a language model.

    Raises:
        InputError: as `model_folder`, or the model is none that generates text.
    """
    folder = model_folder(given)
    if not folder.is_causal_lm:
        raise InputError(f"{folder.architecture} cannot generate text: pass a causal language model")
    return folder


def generating_folder(given: str) -> ModelFolder:
    """The same of a model that continues or answers a text.

    Raises:
        InputError: as `model_folder`, or the model is of another kind.
    """
    folder = model_folder(given)
    if not folder.generates_text:
        raise InputError(
            f"{folder.architecture} cannot generate text from text: pass a causal language model, a vision-language"
            " model, or an encoder-decoder for conditional generation"
        )
    return folder


def load_float_model(folder: ModelFolder, dtype: str = "auto") -> nn.Module:
    """A transformers model from its folder, ready for inference; `dtype` is a torch name or `"auto"`.

    Raises:
        InputError: it is quantized already, of an unsupported architecture, or its weights cannot be read.
    """
    if folder.quantized:
        raise InputError(f"{folder.path} is quantized already: pass the folder of the float model")
    _be_quiet()
    try:
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        model = model_class_of(folder.config).from_pretrained(folder.path, dtype=wanted, local_files_only=True)
    except (LobcqError, MemoryError):
        raise
    except Exception as error:  # of many kinds, and all of them about what is in the folder
        where = _damaged_weights(folder.path) or f"{folder.path} ({folder.architecture})"
        raise InputError(f"cannot load {where}: {first_line(error)}") from error
    return model.eval()  # type: ignore[no-any-return]


def load_model(folder: ModelFolder) -> nn.Module:
    """The folder's model, float or quantized.

    Raises:
        LobcqError: it cannot be loaded.
    """
    _be_quiet()
    return lobcq_fx.load(folder.path) if folder.quantized else load_float_model(folder)


def load_tokenizer(folder: ModelFolder, *, required: bool = True) -> Any:
    """The folder's tokenizer; None where there is none and none is required.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    _be_quiet()
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((folder.path / name).is_file() for name in names):
        if not required:
            return None
        raise InputError(
            f"{folder.path} has no tokenizer: copy the float model's tokenizer files (tokenizer.json, ...) there"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more particular
        raise InputError(f"cannot load the tokenizer of {folder.path}: {first_line(error)}") from error


def load_processor(folder: ModelFolder, *, required: bool = True) -> Any:
    """The folder's processor of images and text; None where there is none and none is required.

    Raises:
        InputError: there is none, or it cannot be read: it may need a package that is not installed.
    """
    _be_quiet()
    if not any((folder.path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        if not required:
            return None
        raise InputError(
            f"{folder.path} has no processor: copy the float model's processor files (processor_config.json,"
            " preprocessor_config.json, chat_template.jinja, ...) there"
        )
    try:
        return transformers.AutoProcessor.from_pretrained(folder.path, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # of many kinds, as those of its parts
        raise InputError(f"cannot load the processor of {folder.path}: {first_line(error)}") from error


def load_reader(folder: ModelFolder, *, required: bool = True) -> Any:
    """What reads a prompt for the folder's model: a processor where it takes images and has one, else a tokenizer.

    Raises:
        InputError: as `load_processor` and `load_tokenizer`.
    """
    processor = load_processor(folder, required=False) if folder.takes_images else None
    return load_tokenizer(folder, required=required) if processor is None else processor


def _damaged_weights(folder: Path) -> str:
    """The first weight file that is not whole, with the remedy; empty if all open."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return f"{path}: the file is not whole, copy or download it again"
    return ""


def first_line(error: Exception) -> str:
    """What an error says, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_text(given: Path | None) -> tuple[str, str]:
    """A text and what to call it; the embedded model's held-out text for None.

    Raises:
        DataError: the file is missing, not UTF-8, or empty.
    """
    text = whole_text(given or lobcq_fx.default_model_path() / HELDOUT)
    return text, str(given) if given else f"embedded {HELDOUT}"


def _names(mapping: Mapping[str, Any]) -> set[str]:
    """The classes of an automatic one of transformers."""
    return {name for names in mapping.values() for name in ([names] if isinstance(names, str) else names)}


def _be_quiet() -> None:
    """Keep libraries from drawing bars of their own and from warning about packages that we do not use."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    text, source = read_text(path)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{source} holds a {type(found).__name__}, no JSON object")
    return found
