"""LobcqConfig: every refusal names the nearest valid value; overrides; JSON round trip."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from lobcq_fx import FormatSpec, LobcqConfig
from lobcq_fx.config import DEFAULT_EXCLUDE, nearest
from lobcq_fx.errors import ConfigError, LobcqError

REFUSED = {
    "mode": ({"mode": "w4a6"}, r"mode='w4a6': use one of \('w4a4', 'w4a8', 'w4a16'\) \(did you mean 'w4a16'\?\)"),
    "mode in capitals": ({"mode": "W4A4"}, r"mode='W4A4': use one of \('w4a4', 'w4a8', 'w4a16'\)"),
    "mode of another type": ({"mode": 4}, "mode=4: use one of"),
    "scale": ({"activation_scale": "per-token"}, r"did you mean 'per_token'\?"),
    "codebooks": ({"codebooks": "universl"}, r"codebooks='universl': .*\(did you mean 'universal'\?"),
    "codebook file": ({"codebooks": "sets.npz"}, r"use one of \('universal', 'fitted'\) or the path of a \.json file"),
    "contradiction": (
        {"mode": "w4a16", "activation_scale": "static"}, "activation_scale='static' contradicts mode='w4a16'",
    ),
    "format": ({"format": "8x65"}, "8x65|65"),
    "format without x": ({"format": "eight"}, "eight"),
    "format of another type": ({"format": 8}, "format=8: pass a FormatSpec or its name"),
    "attention of floats": ({"attention": "w4a8"}, "attention='w4a8' multiplies keys and values that are in LO-BCQ"),
    "attention": ({"attention": "w4a4", "kv_cache": "8x64"}, r"attention='w4a4': use one of \('w4a8', 'w4a16'\)"),
    "format of the cache": ({"kv_cache": "8"}, "format '8': write '<codebooks>x<array size>'"),
    "minimum": ({"min_in_features": 0}, "min_in_features=0: pass a positive integer"),
    "minimum of another type": ({"min_in_features": 1.5}, "min_in_features=1.5"),
    "one pattern": ({"exclude": "lm_head"}, r"exclude='lm_head': pass a list of patterns, for example \['lm_head'\]"),
    "one include pattern": ({"include": "*"}, r"include='\*': pass a list"),
    "override of what has none": ({"overrides": {"*": {"codebooks": "fitted"}}}, r"overrides\['\*'\] sets 'codebooks'"),
    "misspelt override": (
        {"overrides": {"a": {"mod": "w4a4"}}}, r"overrides\['a'\] sets 'mod' \(did you mean 'mode'\?\)",
    ),
    "bad override": ({"overrides": {"a": {"mode": "w4"}}}, r"overrides\['a'\]: mode='w4': use one of"),
    "override that contradicts": (
        {"overrides": {"head": {"mode": "w4a16", "activation_scale": "static"}}},
        r"overrides\['head'\]: activation_scale='static' contradicts mode='w4a16'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        LobcqConfig(**settings)
    with pytest.raises(ConfigError, match=message):
        LobcqConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("modes", "mode"), ("activation_scales", "activation_scale"), ("excludes", "exclude"), ("codebook", "codebooks"),
     ("min_infeatures", "min_in_features"), ("override", "overrides")],
)  # fmt: skip
def test_unknown_settings_name_the_nearest(key, suggestion):
    with pytest.raises(
        ConfigError, match=f"unknown setting '{key}' \\(did you mean '{suggestion}'\\?\\); settings are format"
    ):
        LobcqConfig.from_dict({key: 1})


def test_far_names_get_no_suggestion():
    assert nearest("zzz", ["mode"]) == ""
    with pytest.raises(ConfigError, match="unknown setting 'zzz'; settings are"):
        LobcqConfig.from_dict({"zzz": 1})


def test_errors_are_value_errors_too():
    assert issubclass(ConfigError, (LobcqError, ValueError))
    with pytest.raises(ValueError, match="mode"):
        LobcqConfig(mode="fp8")


CONFIGS = [
    LobcqConfig(),
    LobcqConfig(mode="w4a8", activation_scale="static"),
    LobcqConfig(format="16x32", mode="w4a16", exclude=[], include=["*.q_proj", "*.k_proj"], min_in_features=1),
    LobcqConfig(activation_scale="static", codebooks="fitted"),
    LobcqConfig(kv_cache="16x32"),
    LobcqConfig(kv_cache="16x32", attention="w4a8"),
    LobcqConfig(codebooks="sets/own.json", overrides={"*": {"format": FormatSpec(4, 64)}, "a": {"mode": "w4a16"}}),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(config):
    text = json.dumps(config.to_dict())
    again = LobcqConfig.from_dict(json.loads(text))
    assert again.to_dict() == config.to_dict()
    assert set(config.to_dict()) == {field.name for field in fields(config)}
    for layer in ("a", "b.q_proj"):
        assert again.for_layer(layer) == config.for_layer(layer)
        assert again.refusal(layer) == config.refusal(layer)
    if not config.overrides:
        assert again == config


def test_defaults():
    config = LobcqConfig()
    assert (config.format, config.format.bits_per_scalar) == (FormatSpec(8, 64), 4.5)
    assert (config.mode, config.activation_scale, config.codebooks) == ("w4a4", "per_token", "universal")
    assert config.exclude == DEFAULT_EXCLUDE
    assert not config.needs_calibration


LAYERS = {
    "model.layers.0.self_attn.q_proj": None,
    "model.layers.0.mlp.gate_proj": None,
    "lm_head": "excluded by pattern '*lm_head'",
    "time_embed.linear_1": None,  # what only sounds like an embedding or a norm is a matmul like others
    "transformer_blocks.0.norm1.linear": None,
    "model.layers.3.mlp.gate": "excluded by pattern '*.gate'",
    "model.layers.3.mlp.router": "excluded by pattern '*router*'",
    "classifier": "excluded by pattern '*classifier'",
    "score": "excluded by pattern '*score'",
}


@pytest.mark.parametrize("layer", LAYERS)
def test_what_the_default_patterns_leave_alone(layer):
    assert LobcqConfig().refusal(layer) == LAYERS[layer]


def test_exclude_wins_over_include_and_patterns_are_case_sensitive():
    config = LobcqConfig(include=["block.*"], exclude=["*.Head"])
    assert config.refusal("block.a") is None
    assert config.refusal("block.head") is None
    assert config.refusal("block.Head") == "excluded by pattern '*.Head'"
    assert config.refusal("other") == "matched by no include pattern"


def test_the_last_matching_override_wins_as_a_whole():
    config = LobcqConfig(
        format="4x64",
        overrides={"*": {"mode": "w4a16"}, "*.o": {"format": "16x32"}, "x.*": {"activation_scale": "static"}},
    )
    assert config.for_layer("a").mode == "w4a16"
    assert (config.for_layer("a.o").mode, config.for_layer("a.o").format.name) == ("w4a4", "16x32")
    last = config.for_layer("x.o")
    assert (last.mode, last.format.name, last.activation_scale) == ("w4a4", "4x64", "static")
    assert last.overrides == {}
    assert LobcqConfig(overrides={"b": {"mode": "w4a16"}}).for_layer("a").mode == "w4a4"


def test_what_needs_calibration():
    assert LobcqConfig(codebooks="fitted").needs_calibration
    assert LobcqConfig(activation_scale="static").needs_calibration
    assert LobcqConfig(overrides={"a": {"activation_scale": "static"}}).needs_calibration
    assert not LobcqConfig(mode="w4a16", codebooks="own.json").needs_calibration


def test_frozen():
    config = LobcqConfig(exclude=["a"])
    assert config.exclude == ("a",)
    with pytest.raises(FrozenInstanceError):
        config.mode = "w4a16"  # type: ignore[misc]
    assert replace(config, mode="w4a16").exclude == ("a",)


def test_recipes_are_settings_that_others_win_over():
    assert LobcqConfig.of_recipe("fast") == LobcqConfig()
    balanced = LobcqConfig.of_recipe("balanced", mode="w4a8")
    assert (balanced.mode, balanced.smoothing, balanced.rounding) == ("w4a8", "folded", "compensated")
    assert LobcqConfig.of_recipe("best", smoothing="none").smoothing == "none"
    assert not LobcqConfig.of_recipe("fast").needs_calibration
    assert all(LobcqConfig.of_recipe(name).needs_calibration for name in ("balanced", "best"))
    with pytest.raises(ConfigError, match=r"recipe='balance': .*did you mean 'balanced'"):
        LobcqConfig.of_recipe("balance")
