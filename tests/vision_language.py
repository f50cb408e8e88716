"""Tiny vision-language models, and calls of them as their processors would make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import lobcq_fx
from lobcq_fx.frontends.multimodal_positions import positions_by
from tests.more_families import GROUPED, TINY, Family, LanguageModel, _linear, families, noise, unmasked

IMAGE, VIDEO, START = 90, 91, 92
SIDE, PATCH = 16, 4
TEXT = {**TINY, **GROUPED}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
SQUARE = {**VISION, "image_size": SIDE, "patch_size": 8}
TILES = {"vision_config": {**SQUARE, "patch_size": PATCH}, "scale_factor": 2}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
PATCHES = {
    "depth": 2,
    "num_heads": 4,
    "hidden_size": 64,
    "out_hidden_size": 64,
    "intermediate_size": 96,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
SPECIAL = {"video_token_id": VIDEO, "vision_start_token_id": START}
STEPS = 3
GRIDS = [[1, 4, 4], [1, 8, 4], [1, 4, 6]]
"""Of three images: 4, 8 and 6 tokens."""


class VisionLanguage(LanguageModel):
    """Called with three images: one in the first sequence, which is padded, two in the second, none in the third."""

    before_images: ClassVar[tuple[int, ...]] = ()

    @property
    def config(self) -> Any:
        settings = {"text_config": TEXT, "vision_config": SQUARE, "image_token_id": IMAGE, **self.changes}
        return AutoConfig.for_model(self.model_type, **settings)

    def untrained(self) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_config(self.config)

    def quantized(self, model: PreTrainedModel) -> lobcq_fx.QuantizedModel:
        q = lobcq_fx.quantize(model, static_cache=False)
        of_linears(model)  # for what it is compared with
        return q

    def images(self) -> tuple[dict[str, Tensor], list[int]]:
        """What a processor makes of them, and how many tokens each becomes."""
        return {"pixel_values": noise(3, 3, SIDE, SIDE)}, [4, 4, 4]

    def call(self, model: PreTrainedModel) -> dict[str, Tensor]:
        images, (a, b, c) = self.images()
        one, two, three = ([*self.before_images, *[IMAGE] * count] for count in (a, b, c))
        rows = [[5, *one, 7, 9, 11, 8], [3, *two, 8, *three, 6, 4, 5, 7, 9], [4, 9, 3, 6, 8, 5, 7]]
        length = max(map(len, rows))
        ids, mask = (
            torch.tensor([[0] * (length - len(row)) + (row if tokens else [1] * len(row)) for row in rows])
            for tokens in (True, False)
        )
        return {"input_ids": ids, "attention_mask": mask, **self.types((ids == IMAGE).long()), **images}

    def types(self, of_images: Tensor) -> dict[str, Tensor]:
        """What the processor says of the tokens."""
        return {}

    def results(self, called: nn.Module, call: Mapping[str, Tensor]) -> Tensor:
        if isinstance(called, OptimizedModule):
            return unmasked(called(**self.encoded(called._orig_mod, call)).logits, call)
        return unmasked(called(**call).logits, call)

    def encoded(self, q: nn.Module, call: Mapping[str, Tensor]) -> dict[str, Any]:
        """The call with its images encoded, and positions counted, which both depend on values."""
        images = {name: one for name, one in call.items() if name in self.images()[0]}
        rest = {name: one for name, one in call.items() if name not in images and name != "mm_token_type_ids"}
        positions = {"position_ids": positions_by(q.model, call)} if "mm_token_type_ids" in call else {}
        return {**rest, **positions, "image_features": q.image_features_of(**images)}

    def results_by_steps(self, q: nn.Module, call: Mapping[str, Tensor]) -> Tensor:
        """The same by a prompt with all images, and then token by token on its cache."""
        length = call["input_ids"].shape[1]
        by_token = [name for name, one in call.items() if one.shape[:2] == call["input_ids"].shape]
        prompt = {name: one[:, : length - STEPS] if name in by_token else one for name, one in call.items()}
        out = q(**prompt, use_cache=True)
        logits = [out.logits]
        for stop in range(length - STEPS + 1, length + 1):
            step = {
                "input_ids": call["input_ids"][:, stop - 1 : stop],
                "attention_mask": call["attention_mask"][:, :stop],
            }
            out = q(**step, past_key_values=out[q.calling.cache_name], use_cache=True)
            logits.append(out.logits)
        return unmasked(torch.cat(logits, dim=1), call)


class TypedTokens(VisionLanguage):
    """Tokens of an image attend in both directions."""

    def types(self, of_images: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": of_images}


class TypedPrefix(VisionLanguage):
    """Tokens of the prompt attend in both directions, those of an answer do not."""

    def types(self, of_images: Tensor) -> dict[str, Tensor]:
        kinds = torch.zeros_like(of_images)
        kinds[:, -STEPS:] = 1
        return {"token_type_ids": kinds}


class Tiles(VisionLanguage):
    def images(self) -> tuple[dict[str, Tensor], list[int]]:
        pixels, mask = torch.zeros(3, 2, 3, SIDE, SIDE), torch.zeros(3, 2, SIDE, SIDE, dtype=torch.long)
        pixels[0, 0], pixels[1] = noise(3, 3, SIDE, SIDE)[0], noise(3, 3, SIDE, SIDE)[1:]
        mask[0, 0], mask[1, 0], mask[1, 1, : SIDE // 2] = 1, 1, 1
        return {"pixel_values": pixels, "pixel_attention_mask": mask}, [4, 4, 4]


class Patches(VisionLanguage):
    before_images = (START,)

    def images(self) -> tuple[dict[str, Tensor], list[int]]:
        grid = torch.tensor(GRIDS)
        counts = grid.prod(dim=1)
        return {"pixel_values": noise(int(counts.sum()), 3 * 2 * PATCH**2), "image_grid_thw": grid}, (
            counts // 4
        ).tolist()

    def types(self, of_images: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": of_images}


class LinearProjector(nn.Module):
    """A Gemma 3 projector whose weight is a linear's, under the same name."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.norm, self.pool, self.side = projector.mm_soft_emb_norm, projector.avg_pool, projector.patches_per_image
        weight = projector.mm_input_projection_weight
        self.mm_input_projection_weight = _linear(weight.t().contiguous(), torch.zeros(weight.shape[1]))

    def forward(self, vision_outputs: Tensor) -> Tensor:
        images = vision_outputs.transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.mm_input_projection_weight(self.norm(self.pool(images).flatten(2).transpose(1, 2)))


def of_linears(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, changed so that its projections are all linears."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "mm_input_projection_weight") and not isinstance(module, LinearProjector):
            model.set_submodule(name, LinearProjector(module))
    return model


def _qwen(**vision: Any) -> dict[str, Any]:
    return {"text_config": {**TEXT, **ROTATED}, "vision_config": {**PATCHES, **vision}, **SPECIAL}


VISION_LANGUAGE: dict[str, Family] = {
    **families(
        VisionLanguage,
        "llava",
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **SQUARE, "num_hidden_layers": 2},
    ),
    **families(
        VisionLanguage,
        "aya_vision",
        downsample_factor=1,
        text_config={"model_type": "cohere2", **TEXT},
        vision_config={"model_type": "siglip_vision_model", **SQUARE, "vision_use_head": False},
    ),
    **families(
        VisionLanguage,
        "internvl",
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
    ),
    **families(
        TypedPrefix,
        "paligemma",
        projection_dim=64,
        text_config={"model_type": "gemma", **TEXT},
        vision_config={"model_type": "siglip_vision_model", **SQUARE, "vision_use_head": False},
    ),
    **families(
        TypedTokens,
        "gemma3",
        mm_tokens_per_image=4,
        text_config={
            **TEXT,
            "num_hidden_layers": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={**SQUARE, "patch_size": PATCH, "vision_use_head": False},
    ),
    **families(Tiles, "idefics3 smolvlm", **{**TILES, "text_config": {"model_type": "llama", **TEXT}}),
    **families(Patches, "qwen2_vl", **_qwen(embed_dim=64, mlp_ratio=2)),
    **families(Patches, "qwen2_5_vl", **_qwen(window_size=16, fullatt_block_indexes=[1])),
    **families(Patches, "qwen3_vl", **_qwen(num_position_embeddings=16, deepstack_visual_indexes=[0])),
}
