"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="DIR_or_default",
        show_default=False,
        help="Folder of a Hugging Face model (config.json, weights, tokenizer); [bold]default[/] for the embedded one.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is already there.")]
FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NxL",
        help="Codebooks x scalars that share a scale: 8x64 is 4.5 bits a scalar; 2x128 4.19, 16x32 4.75.",
    ),
]
ActivationFormatOption = Annotated[
    str | None,
    typer.Option(
        metavar="NxL",
        help="Another format for activations than for weights: more codebooks (16x64), or shorter arrays (16x16).",
    ),
]
KvCacheOption = Annotated[
    str | None,
    typer.Option(
        metavar="NxL",
        show_default=False,
        help="Keep keys and values in this format: 8x64 is 4.5 bits a scalar. Default: as the model was quantized for.",
    ),
]
SampleOption = Annotated[bool, typer.Option("--sample", help="Draw tokens at random instead of taking the likeliest.")]
TemperatureOption = Annotated[float, typer.Option(min=0.01, help="With --sample: higher is more random.")]
TopPOption = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="With --sample: draw from the likeliest tokens only.")
]
SeedOption = Annotated[int, typer.Option(help="With --sample: fixes what is drawn.")]
SystemOption = Annotated[
    str | None, typer.Option(metavar="TEXT", show_default=False, help="Instructions for the model, before all turns.")
]
SamplesOption = Annotated[
    int, typer.Option(min=1, help="Sequences of the calibration text to use, spread evenly over it.")
]
LengthOption = Annotated[int, typer.Option(min=8, help="Tokens in a calibration sequence.")]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Calibrate a few layers at a time, whose weights, and activations between them, take at most so much, such"
        " as 8GB. Without, the whole model is loaded.",
        show_default=False,
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="UTF-8 text; without it the embedded model's held-out text."),
]


class Mode(StrEnum):
    """What is quantized: weights and activations, or weights alone."""

    w4a4 = "w4a4"
    w4a8 = "w4a8"
    w4a16 = "w4a16"


class Attention(StrEnum):
    """What keys and values of a quantized cache are multiplied as."""

    w4a8 = "w4a8"
    w4a16 = "w4a16"


class ActivationScale(StrEnum):
    """Whether an activation's tensor scale is computed for each token or calibrated once a layer."""

    per_token = "per_token"
    static = "static"


class Rounding(StrEnum):
    """Whether columns that are rounded later make up for the errors of earlier ones."""

    nearest = "nearest"
    compensated = "compensated"


class Recipe(StrEnum):
    """Settings of rounding, smoothing and rotation that go together."""

    fast = "fast"
    balanced = "balanced"
    best = "best"


class Smoothing(StrEnum):
    """Whether columns of activations that stand out are evened out against the weight's."""

    none = "none"
    folded = "folded"
    everywhere = "everywhere"


class Rotation(StrEnum):
    """Whether the columns of block arrays are rotated where that lowers the error."""

    none = "none"
    hadamard = "hadamard"


class Dtype(StrEnum):
    """Floating-point type of what stays in float."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


AttentionOption = Annotated[
    Attention | None,
    typer.Option(
        show_default=False,
        help="With --kv-cache: multiply cached keys and values in integers (w4a8), or in fp32 (w4a16, the default).",
    ),
]


def sampling(sample: bool, temperature: float, top_p: float) -> dict[str, Any]:
    """The arguments of `generate()` that say how tokens are taken."""
    drawn = {"temperature": temperature, "top_p": top_p} if sample else {}
    return {"do_sample": sample, **drawn}


def cache_arguments(kv_cache: str | None, attention: Attention | None) -> dict[str, Any] | None:
    """The arguments of a `LobcqCache`; None where the options ask for none.

    Raises:
        BadParameter: a way to multiply what is not there.
    """
    if kv_cache is not None:
        return {"format": kv_cache, "attention": (attention or Attention.w4a16).value}
    if attention is not None:
        raise typer.BadParameter("--attention: it multiplies keys and values in LO-BCQ: pass --kv-cache too")
    return None
