"""What the layers of a Hugging Face model are to it, whatever they are called."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

HEAD = "head"


def roles_of(model: PreTrainedModel) -> dict[str, str]:
    """Module path -> "head" for the linears that make a model's results: logits of a vocabulary, scores of labels.

    That is what `get_output_embeddings` returns, and every linear outside the base model that has an output for each
    word, for each label, or, for spans, two.
    """
    names = {module: name for name, module in model.named_modules()}
    heads = [module for module in (model.get_output_embeddings(),) if module in names]
    base = model.base_model
    if base is not model:
        inside = set(base.modules())
        widths = _result_widths(model)
        heads += [m for m in names if isinstance(m, nn.Linear) and m not in inside and m.out_features in widths]
    return {names[module]: HEAD for module in heads}


def _result_widths(model: PreTrainedModel) -> set[int]:
    config = model.config
    text = config.get_text_config()
    known = (
        getattr(config, "num_labels", None),
        getattr(text, "vocab_size", None),
        getattr(config, "vocab_size", None),
    )
    return {width for width in known if isinstance(width, int)}
