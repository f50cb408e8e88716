"""What transformers' classes change of generate(): each change is kept, without effect, or a reason to refuse."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch
import transformers
from transformers import GenerationMixin, PreTrainedModel

import lobcq_fx
from lobcq_fx.errors import TraceError
from lobcq_fx.frontends.causal_lm import CausalLMForward
from lobcq_fx.frontends.generation_overrides import GENERATION, check_overrides, delegated, lost_overrides, overrides
from tests.families import LLAMA, ONE_LAYER, causal_lm, fake_quantized, quantized_layers

PREPARE, UPDATE = "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"
POSITIONS = "_prepare_position_ids_for_generation"
# Read one by one. Whatever else a release overrides is refused, so that only this list may need to grow.
ACCEPTED = {
    ("phi3", "Phi3ForCausalLM", PREPARE),
    ("phimoe", "PhimoeForCausalLM", PREPARE),
    ("phi4_multimodal", "Phi4MultimodalForCausalLM", PREPARE),
    ("ctrl", "CTRLLMHeadModel", PREPARE),
    ("roc_bert", "RoCBertForCausalLM", PREPARE),
    ("gemma3", "Gemma3ForConditionalGeneration", PREPARE),
    ("gemma4", "Gemma4ForConditionalGeneration", PREPARE),
    ("gemma4_unified", "Gemma4UnifiedForConditionalGeneration", PREPARE),
    ("mamba", "MambaForCausalLM", PREPARE),
    ("mamba2", "Mamba2ForCausalLM", PREPARE),
    ("falcon_mamba", "FalconMambaForCausalLM", PREPARE),
    ("bamba", "BambaForCausalLM", PREPARE),
    ("falcon_h1", "FalconH1ForCausalLM", PREPARE),
    ("nemotron_h", "NemotronHForCausalLM", PREPARE),
    ("zamba2", "Zamba2ForCausalLM", PREPARE),
    ("whisper", "WhisperForConditionalGeneration", PREPARE),
    ("paligemma", "PaliGemmaForConditionalGeneration", PREPARE),
    ("paligemma", "PaliGemmaForConditionalGeneration", UPDATE),
    ("qwen2_vl", "Qwen2VLForConditionalGeneration", POSITIONS),
    ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", POSITIONS),
    ("qwen3_vl", "Qwen3VLForConditionalGeneration", POSITIONS),
}


def written_overrides():
    """(folder, module, class, method) of every method of `generate()` that a class of transformers' models defines."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if not any(f"def {name}(" in source for name in GENERATION):
            continue
        for node in ast.parse(source).body:
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(part, ast.FunctionDef) and part.name in GENERATION:
                    yield path.parent.name, f"transformers.models.{path.parent.name}.{path.stem}", node.name, part.name


def test_every_override_of_transformers_is_accepted_by_name_or_refused():
    accepted, refused = set(), set()
    for folder, module, name, method in written_overrides():
        try:
            kind = getattr(importlib.import_module(module), name)
        except ImportError:  # needs an optional package: nobody without it can quantize it
            continue
        if not (issubclass(kind, PreTrainedModel) and issubclass(kind, GenerationMixin)):
            continue
        assert overrides(kind)[method] is kind
        lost = method in lost_overrides(kind, kind.config_class)
        (refused if lost else accepted).add((folder, name, method))
    assert accepted == ACCEPTED
    assert ("musicgen", "MusicgenForCausalLM", "generate") in refused
    assert ("glm4v", "Glm4vForConditionalGeneration", POSITIONS) in refused
    assert len(refused) > 60


def test_plain_classes_change_nothing():
    for kind in (transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel, transformers.OPTForCausalLM):
        assert overrides(kind) == {}


class OwnPrepare(transformers.LlamaForCausalLM):
    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs)


class Inherits(OwnPrepare):
    pass


class OwnType(transformers.Phi3ForCausalLM):
    class Config(transformers.Phi3Config):
        model_type = "someone_s_phi3"

    config_class = Config


def test_a_class_of_the_user_s_and_a_method_of_the_instance_are_refused():
    config = transformers.LlamaConfig(**LLAMA)
    for kind in (OwnPrepare, Inherits):
        with pytest.raises(TraceError, match=rf"{kind.__name__} .*: OwnPrepare overrides {PREPARE}\. Remedy: wrap"):
            lobcq_fx.quantize(kind(config))
    # Nobody could find the class again from this configuration.
    assert lost_overrides(OwnType, OwnType.Config) == {PREPARE: "Phi3ForCausalLM"}
    model = causal_lm("llama")
    check_overrides(model)
    model.generate = print
    with pytest.raises(TraceError, match="the instance overrides generate"):
        lobcq_fx.quantize(model)


def longrope(config_class, **changes):
    """A model that switches to other frequencies beyond 12 tokens."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0,
    }  # fmt: skip
    sizes = {**ONE_LAYER, "hidden_size": 64, "head_dim": 16, "max_position_embeddings": 48, **changes}
    torch.manual_seed(0)
    config = config_class(**sizes, original_max_position_embeddings=12, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def test_phi3_recomputes_its_cache_where_longrope_switches(tmp_path):
    model = longrope(transformers.Phi3Config)
    q = lobcq_fx.quantize(model)
    q.save_pretrained(tmp_path / "q")
    ids = torch.arange(3, 11)[None]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings["attention_mask"] = torch.ones_like(ids)
    with fake_quantized(model, quantized_layers(q), exact=True):
        expected = model.generate(ids, **settings)
    for one in (q, lobcq_fx.load(tmp_path / "q")):
        assert torch.equal(one.generate(ids, **settings), expected)
        assert torch.equal(one.generate(ids, **settings, cache_implementation="static"), expected)
    # It is the switch that is tested: without it the tokens beyond it differ.
    kept_cache = model.generate.__func__
    with pytest.MonkeyPatch.context() as patch, fake_quantized(model, quantized_layers(q), exact=True):
        patch.delattr(type(model), PREPARE)
        without = kept_cache(model, ids, **settings)
    assert torch.equal(without[:, :12], expected[:, :12])
    assert not torch.equal(without, expected)


def test_an_adopted_method_s_super_looks_behind_the_quantized_class():
    adopted = delegated("phimoe", PREPARE, CausalLMForward)
    original = transformers.PhimoeForCausalLM.prepare_inputs_for_generation
    assert adopted.__code__ is original.__code__
    assert adopted.__closure__[0].cell_contents is CausalLMForward
    assert delegated("llama", PREPARE, CausalLMForward) is None
    assert delegated("phimoe", "generate", CausalLMForward) is None
