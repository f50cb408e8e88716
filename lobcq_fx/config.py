"""LobcqConfig: what to quantize and how. Frozen, validated, with a JSON round trip."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from lobcq_fx.errors import ConfigError
from lobcq_fx.format import FormatSpec

MODES = ("w4a4", "w4a8", "w4a16")
ACTIVATION_SCALES = ("per_token", "static")
CODEBOOKS = ("universal", "fitted")
ROUNDINGS = ("nearest", "compensated")
SMOOTHINGS = ("none", "folded", "everywhere")
ROTATIONS = ("none", "hadamard")
ATTENTIONS = ("w4a8", "w4a16")
OVERRIDABLE = ("format", "mode", "activation_format", "activation_scale", "rounding", "smoothing", "rotation")

CALIBRATED = "static scales, fitted codebooks, smoothing, rotation, compensated rounding and budgets of bits"
"""The settings that need calibration data, for messages."""

NEEDING_DATA = {
    "activation_scale": ("static",),
    "codebooks": ("fitted",),
    "rounding": ("compensated",),
    "smoothing": SMOOTHINGS[1:],
    "rotation": ROTATIONS[1:],
}
"""Of each setting the values that cannot be applied without calibration data."""

ROLES = ("head",)
"""What a layer can be to a model, for patterns: `@head` is an output head, whatever the model calls it."""

RECIPES: dict[str, dict[str, str]] = {
    "fast": {},
    "balanced": {"smoothing": "folded", "rounding": "compensated"},
    "best": {"smoothing": "everywhere", "rotation": "hadamard", "rounding": "compensated"},
}
"""Settings that go together, by name: without data; at no cost when the model runs; all that lowers the error."""

LEAST_BITS = FormatSpec(2, 128).bits_per_scalar
"""Of a budget: the smallest format that one chooses from."""

DEFAULT_EXCLUDE = ("@head", "*lm_head", "*router*", "*.gate", "*.gate.*", "*classifier", "*score")
"""Output heads and mixture-of-experts routers stay in float, as in the paper. Embeddings and norms are no matmuls."""


@dataclass(frozen=True)
class LobcqConfig:
    """Settings of `quantize`.

    Args:
        format: the number format, a `FormatSpec` or its name `"<N_c>x<L_A>"`; default `"8x64"`, 4.5 bits a scalar.
        mode: `"w4a4"` encodes weights and activations, `"w4a8"` activations in int8, `"w4a16"` weights alone.
        activation_format: of activations, where it differs from `format`: more codebooks, or shorter arrays (of which
            the weights' are a multiple).
        activation_scale: `"per_token"` computes a tensor scale for each token, `"static"` calibrates one a layer.
        codebooks: `"universal"` (shipped with the package), `"fitted"` (to this model's weights and calibration
            data), or the path of a JSON file written by `lobcq calibrate`.
        rounding: `"nearest"` rounds every weight to the nearest of the format; `"compensated"` lets columns that are
            rounded later make up for the errors of earlier ones (GPTQ inside the format), which needs calibration data,
            time, and memory: for K^2 floats of one layer, and for what all calls hold between two layers.
        smoothing: a scale for each input column of a layer, which activations are divided by and weights multiplied,
            so that neither has columns that stand out: `"folded"` where a norm or a linear before takes the division
            over, at no cost; `"everywhere"` with a multiplication where none does. Needs calibration data.
        rotation: `"hadamard"` rotates the columns of each block array wherever calibration data show a smaller error
            with it. Activations are rotated when the model runs, on their way into the encoder.
        kv_cache: of a language model, the format of the keys and values in the caches that it makes by itself, in calls
            and in `generate()`: see `LobcqCache`. None leaves them in float.
        attention: how attention multiplies keys and values of such a cache. `"w4a16"` decodes them and multiplies in
            fp32; `"w4a8"` multiplies them as the integers they are, with queries and weights of tokens in int8.
        include: shell-style patterns of layer names, or `@head` for output heads, whatever they are called (known for
            Hugging Face models); a layer is quantized if one matches.
        exclude: shell-style patterns of layer names left in float; they win over `include`.
        overrides: pattern -> settings (`format`, `mode`, `activation_format`, ...) for the layers it matches; the
            last matching pattern wins.
        min_in_features: matmuls with a shorter reduction dimension are left in float.
        bits: a budget for a scalar of the weights, on the average. `quantize` measures on the calibration data what
            each layer does to the model's results, and gives each its own mode and formats: an override for each layer,
            which the quantized model's settings then have in the place of the budget. `overrides` win.
        activation_bits: the same for activations, weighted by multiply-adds; None is `bits` in `"w4a4"`, and what the
            mode takes in others. An activation in float counts 16.

    Raises:
        ConfigError: an unknown value or setting (with the nearest valid one), or settings that contradict each other.
    """

    format: FormatSpec = field(default_factory=FormatSpec)
    mode: str = "w4a4"
    activation_format: FormatSpec | None = None
    activation_scale: str = "per_token"
    codebooks: str = "universal"
    rounding: str = "nearest"
    smoothing: str = "none"
    rotation: str = "none"
    kv_cache: FormatSpec | None = None
    attention: str = "w4a16"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    min_in_features: int = 16
    bits: float | None = None
    activation_bits: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", format_of(self.format))
        if self.activation_format is not None:
            object.__setattr__(self, "activation_format", format_of(self.activation_format))
        if self.kv_cache is not None:
            object.__setattr__(self, "kv_cache", format_of(self.kv_cache))
        object.__setattr__(self, "include", _patterns("include", self.include))
        object.__setattr__(self, "exclude", _patterns("exclude", self.exclude))
        _check_choice("mode", self.mode, MODES)
        _check_choice("activation_scale", self.activation_scale, ACTIVATION_SCALES)
        _check_choice("rounding", self.rounding, ROUNDINGS)
        _check_choice("smoothing", self.smoothing, SMOOTHINGS)
        _check_choice("rotation", self.rotation, ROTATIONS)
        check_attention(self.attention)
        if self.attention != "w4a16" and self.kv_cache is None:
            raise ConfigError(
                f"attention={self.attention!r} multiplies keys and values that are in LO-BCQ: say in which format, for"
                " example kv_cache='8x64', or leave attention out"
            )
        if self.codebooks not in CODEBOOKS and not str(self.codebooks).endswith(".json"):
            hint = nearest(str(self.codebooks), CODEBOOKS)
            raise ConfigError(f"codebooks={self.codebooks!r}: use one of {CODEBOOKS} or the path of a .json file{hint}")
        if self.mode == "w4a16" and self.activation_scale == "static":
            raise ConfigError("activation_scale='static' contradicts mode='w4a16', which leaves activations in float")
        if self.rotation != "none" and self.activation_scale == "static":
            raise ConfigError(
                f"activation_scale='static' contradicts rotation={self.rotation!r}: the extremes of rotated activations"
                " are not known; use activation_scale='per_token', or rotation='none'"
            )
        self._check_activation_format()
        if not isinstance(self.min_in_features, int) or self.min_in_features < 1:
            raise ConfigError(f"min_in_features={self.min_in_features!r}: pass a positive integer")
        self._check_budget()
        for pattern in (*self.include, *self.exclude, *self.overrides):
            if pattern.startswith("@") and pattern[1:] not in ROLES:
                raise ConfigError(f"pattern {pattern!r} names no role: use one of {[f'@{role}' for role in ROLES]}")
        for pattern in self.overrides:
            self._overridden(pattern)
            if pattern in self.exclude:
                raise ConfigError(
                    f"overrides[{pattern!r}] contradicts exclude, which leaves the same layers in float: pass an"
                    " exclude without it (`lobcq quantize --no-default-exclude`)"
                )

    @classmethod
    def of_recipe(cls, name: str, **settings: Any) -> LobcqConfig:
        """The settings of a recipe, `"fast"`, `"balanced"` or `"best"`, and others, which win.

        Raises:
            ConfigError: another name (with the nearest recipe), or a bad setting.
        """
        _check_choice("recipe", name, tuple(RECIPES))
        return cls.from_dict({**RECIPES[name], **settings})

    @classmethod
    def auto(cls, bits: float = 4.5, activation_bits: float | None = None, **settings: Any) -> LobcqConfig:
        """The settings of recipe `"best"` within a budget of bits, and others, which win.

        Raises:
            ConfigError: a budget that no format fits in, or a bad setting.
        """
        return cls.of_recipe("best", **{"bits": bits, "activation_bits": activation_bits, **settings})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LobcqConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a key that is no setting (names the nearest one), or a bad value.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown setting {key!r}{nearest(key, known)}; settings are {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return {
            "format": self.format.name,
            "mode": self.mode,
            "activation_format": None if self.activation_format is None else self.activation_format.name,
            "activation_scale": self.activation_scale,
            "codebooks": self.codebooks,
            "rounding": self.rounding,
            "smoothing": self.smoothing,
            "rotation": self.rotation,
            "kv_cache": None if self.kv_cache is None else self.kv_cache.name,
            "attention": self.attention,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "overrides": {
                pattern: {key: one.name if isinstance(one, FormatSpec) else one for key, one in settings.items()}
                for pattern, settings in self.overrides.items()
            },
            "min_in_features": self.min_in_features,
            "bits": self.bits,
            "activation_bits": self.activation_bits,
        }

    @property
    def activations(self) -> FormatSpec:
        """The format of activations that are encoded."""
        return self.format if self.activation_format is None else self.activation_format

    def require_decided(self) -> None:
        """Refuse a budget, for what needs a mode and formats for each layer.

        Raises:
            ConfigError: there is one.
        """
        if self.bits is not None:
            raise ConfigError(
                f"bits={self.bits!r} is a budget, which only quantize() spends: pass the settings of what it gives"
                " (`quantize(...).lobcq_config`), or leave bits out"
            )

    def for_layer(self, layer: str, role: str | None = None) -> LobcqConfig:
        """The settings that hold for a layer, of a role or of none, overrides applied."""
        matching = [pattern for pattern in self.overrides if _matches(pattern, layer, role)]
        return self._overridden(matching[-1]) if matching else self

    def refusal(self, layer: str, role: str | None = None) -> str | None:
        """Why the patterns leave a layer in float, or None where they do not."""
        for pattern in self.exclude:
            if _matches(pattern, layer, role):
                return f"excluded by pattern {pattern!r}"
        if not any(_matches(pattern, layer, role) for pattern in self.include):
            return "matched by no include pattern"
        return None

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The settings that cannot be applied without calibration data, each as it is written."""
        every = [self, *map(self._overridden, self.overrides)]
        chosen = [(name, getattr(one, name)) for one in every for name in NEEDING_DATA]
        found = [f"{name}={value!r}" for name, value in chosen if value in NEEDING_DATA[name]]
        if self.bits is not None:
            found.append(f"bits={self.bits!r}")
        return tuple(dict.fromkeys(found))

    @property
    def needs_calibration(self) -> bool:
        """Whether these settings cannot be applied without calibration data."""
        return bool(self.calibrated)

    def _check_budget(self) -> None:
        if self.activation_bits is not None and self.bits is None:
            raise ConfigError(f"activation_bits={self.activation_bits!r} needs bits, the budget of the weights")
        for name in ("bits", "activation_bits"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and LEAST_BITS <= value < math.inf):
                raise ConfigError(f"{name}={value!r}: pass a number of bits a scalar, from {LEAST_BITS} on")

    def _check_activation_format(self) -> None:
        given = self.activation_format
        if given is None:
            return
        if self.mode != "w4a4":
            raise ConfigError(
                f"activation_format={given.name!r} contradicts mode={self.mode!r}, which encodes no activation in it"
            )
        if self.format.array_size % given.array_size:
            raise ConfigError(
                f"activation_format={given.name!r}: arrays of {given.array_size} are longer than the weights' in"
                f" format={self.format.name!r}; use one up to '{given.num_codebooks}x{self.format.array_size}'"
            )

    def _overridden(self, pattern: str) -> LobcqConfig:
        settings = self.overrides[pattern]
        for key in settings:
            if key not in OVERRIDABLE:
                hint = nearest(key, OVERRIDABLE)
                raise ConfigError(f"overrides[{pattern!r}] sets {key!r}{hint}; it may set {', '.join(OVERRIDABLE)}")
        # What only encoded activations have is no contradiction where the layers of a pattern have none.
        mode = settings.get("mode", self.mode)
        dropped: dict[str, Any] = {}
        if mode != "w4a4":
            dropped["activation_format"] = None
        if mode == "w4a16":
            dropped["activation_scale"] = "per_token"
        try:
            return replace(self, overrides={}, bits=None, activation_bits=None, **{**dropped, **settings})
        except ConfigError as error:
            raise ConfigError(f"overrides[{pattern!r}]: {error}") from None


def _matches(pattern: str, layer: str, role: str | None) -> bool:
    """Whether a pattern means the layer: `@role` by what it is to the model, anything else by its name."""
    return pattern == f"@{role}" if pattern.startswith("@") else fnmatchcase(layer, pattern)


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def format_of(value: FormatSpec | str) -> FormatSpec:
    """A format given as such or by its name.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, FormatSpec):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"format={value!r}: pass a FormatSpec or its name, for example '8x64'")
    try:
        return FormatSpec.from_name(value)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_attention(value: str) -> None:
    """Refuse another way to multiply keys and values.

    Raises:
        ConfigError: no such way.
    """
    _check_choice("attention", value, ATTENTIONS)


def _patterns(name: str, value: Iterable[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ConfigError(f"{name}={value!r}: pass a list of patterns, for example [{value!r}]")
    return tuple(value)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: use one of {choices}{nearest(str(value), choices)}")
