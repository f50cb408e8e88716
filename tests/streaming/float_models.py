"""Folders of tiny float models."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers


def save_float_model(
    config: transformers.PreTrainedConfig, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str
) -> None:
    """A language model of random weights, in whose files no bias and no norm is the constant that it is at first."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
