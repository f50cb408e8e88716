"""What a model's class changes of `generate()`: its quantized model does the same, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

import transformers
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from lobcq_fx.errors import TraceError

GENERATION = frozenset(name for name in vars(GenerationMixin) if not name.startswith("__")) - {"output_modalities"} | {
    "_reorder_cache",
    "_supported_generation_modes",
    "generation_config_class",
}
"""What `generate()` is made of. Masks are not: the graph makes its own, whatever the class has for static caches."""

PREPARE = "prepare_inputs_for_generation"
POSITIONS, UPDATE = "_prepare_position_ids_for_generation", "_update_model_kwargs_for_generation"
EXPAND = "_expand_inputs_for_generation"

DELEGATED: Mapping[str, frozenset[str]] = {
    # LongRoPE: beyond the original length the cache is computed anew, with the long factors.
    "Phi3ForCausalLM": frozenset({PREPARE}),
    "PhimoeForCausalLM": frozenset({PREPARE}),
    "Phi4MultimodalForCausalLM": frozenset({PREPARE}),
    # Positions that count along a padded prompt of tokens heard before.
    "WhisperForConditionalGeneration": frozenset({PREPARE}),
    # Which tokens are images, in a first call; positions from 1 on; and what a new token is.
    "Gemma3ForConditionalGeneration": frozenset({PREPARE}),
    "PaliGemmaForConditionalGeneration": frozenset({PREPARE, UPDATE}),
    # Positions of images in time, height and width.
    "Qwen2VLForConditionalGeneration": frozenset({POSITIONS}),
    "Qwen2_5_VLForConditionalGeneration": frozenset({POSITIONS}),
    "Qwen3VLForConditionalGeneration": frozenset({POSITIONS}),
}
"""Methods that quantized models of these classes call, bound to themselves."""

INHERITED: Mapping[str, frozenset[str]] = {"WhisperGenerationMixin": frozenset({"generate"})}
"""Methods that quantized models have of these classes, which are bases of theirs too."""

HARMLESS: Mapping[str, frozenset[str]] = {
    # Drops token_type_ids, which a quantized model refuses.
    "CTRLLMHeadModel": frozenset({PREPARE}),
    # Cuts inputs of other names, which a quantized model refuses.
    "RoCBertForCausalLM": frozenset({PREPARE}),
    # Passes on which tokens are pictures, in a first call: of text alone it says nothing.
    "Gemma4ForConditionalGeneration": frozenset({PREPARE}),
    "Gemma4UnifiedForConditionalGeneration": frozenset({PREPARE}),
    # Repeat pixels for beams, of which a quantized model repeats the features (transformers before 5.23).
    "Qwen2VLForConditionalGeneration": frozenset({EXPAND}),
    "Qwen2_5_VLForConditionalGeneration": frozenset({EXPAND}),
    "Qwen3VLForConditionalGeneration": frozenset({EXPAND}),
    # Drop the mask of steps, of which the graph takes the last tokens alone.
    "MambaForCausalLM": frozenset({PREPARE}),
    "Mamba2ForCausalLM": frozenset({PREPARE}),
    "FalconMambaForCausalLM": frozenset({PREPARE}),
    # Ask for as many last logits as the configuration says, of which generation reads the last.
    "BambaForCausalLM": frozenset({PREPARE}),
    "FalconH1ForCausalLM": frozenset({PREPARE}),
    "NemotronHForCausalLM": frozenset({PREPARE}),
    "Zamba2ForCausalLM": frozenset({PREPARE}),
}
"""Methods that change nothing of the calls that a quantized model serves, each found out by reading it."""


def overrides(model_class: type) -> dict[str, type]:
    """{method: the class that defines it} of what a class changes of `generate()`."""
    plain = (GenerationMixin, PreTrainedModel)
    owners = {name: next((one for one in model_class.__mro__ if name in vars(one)), None) for name in GENERATION}
    return {name: owner for name, owner in sorted(owners.items()) if owner is not None and owner not in plain}


def lost_overrides(model_class: type, config: Any) -> dict[str, str]:
    """{method: the class's name that defines it} of what a quantized model of this configuration would not do."""
    return {
        name: owner.__name__
        for name, owner in overrides(model_class).items()
        if not _kept(name, owner, config.model_type)
    }


def check_overrides(model: PreTrainedModel) -> None:
    """That the model's quantized model will generate as it does.

    Raises:
        TraceError: its class, or the instance, changes `generate()` in a way that would be lost.
    """
    own = dict.fromkeys(sorted(GENERATION & vars(model).keys()), "the instance")
    for name, owner in {**lost_overrides(type(model), model.config), **own}.items():
        raise TraceError(
            f"{type(model).__name__} generates in a way of its own, which would be lost: {owner} overrides {name}."
            " Remedy: wrap it in a torch.nn.Module that calls it with use_cache=False and returns the logits, and"
            " quantize that with example_inputs (it will not generate); or remove the override"
        )


def needs_images(model: PreTrainedModel) -> bool:
    """Whether its class changes what a quantized model does only where it takes images."""
    return not DELEGATED.get(type(model).__name__, frozenset()) <= {PREPARE}


def delegated(model_type: str, name: str, owner: type) -> Callable[..., Any] | None:
    """The method with which a quantized model of `owner` stands in for `generate()`'s own; None if there is none.

    It is the original class's, except that its `super()` looks behind `owner`.
    """
    original = _class_of(model_type)
    if not isinstance(original, str) or name not in DELEGATED.get(original, ()):
        return None
    function = getattr(getattr(transformers, original), name)
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closure = tuple(CellType(owner) if variable == "__class__" else cell for variable, cell in cells)
    adopted = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, closure)
    adopted.__kwdefaults__ = function.__kwdefaults__
    return adopted


def _kept(name: str, owner: type, model_type: str) -> bool:
    if not owner.__module__.startswith("transformers."):
        return False
    if name in DELEGATED.get(owner.__name__, ()):
        return bool(_class_of(model_type) == owner.__name__)
    return name in HARMLESS.get(owner.__name__, ()) or name in INHERITED.get(owner.__name__, ())


def _class_of(model_type: str) -> Any:
    """Name of the class that generates, of a kind of model."""
    mappings = (
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return next((one[model_type] for one in mappings if model_type in one), None)
