"""What an exported graph takes and returns: names, an example, and which dimensions are free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lobcq_fx.errors import ExportError
from lobcq_fx.export.float32 import NARROW
from lobcq_fx.export.kept_positions import KEPT
from lobcq_fx.frontends.causal_lm_call import CausalLMCall
from lobcq_fx.model import QuantizedModel
from lobcq_fx.tracing.calling import ModuleCall
from lobcq_fx.tracing.structure import Structure

# Every size is different and at least 2: export bakes dimensions of 0 or 1 in and may identify equal ones.
BATCH, PAST, QUERY = 2, 5, 3

PADDING = 2
"""Positions; fewer than a prompt's, one of which has to be a token."""

PAST_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."


@dataclass(frozen=True)
class Signature:
    """What a graph is exported by, and what the exported one is checked on.

    inputs: name -> example. outputs: names. dynamic: for each input its free dimensions and their names. samples: calls
    to compare both graphs on, inputs in order.
    """

    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    samples: tuple[tuple[Tensor, ...], ...]


def signature_of(q: QuantizedModel, example_inputs: Any) -> Signature:
    """The signature of q's exported graph.

    Raises:
        ExportError: q is no language model and there is no usable example.
    """
    if isinstance(q.calling, CausalLMCall):
        return _causal_lm(q.calling)
    assert isinstance(q.calling, ModuleCall)
    return _module(q, q.calling, example_inputs)


def _causal_lm(calling: CausalLMCall) -> Signature:
    """Names as onnxruntime-genai and optimum have them. Checked: a prompt, one more token, several for one sequence."""
    inputs = _causal_lm_call(calling, BATCH, PAST, QUERY)
    states = [name for name in inputs if name.startswith(PAST_PREFIX)]
    dynamic = {name: {0: "batch", 1: "sequence"} for name in inputs}
    dynamic["attention_mask"] = {0: "batch", 1: "total_sequence"}
    dynamic |= {name: {0: "batch", 2: "past_sequence"} for name in states}
    outputs = ("logits", *(name.replace(PAST_PREFIX, PRESENT_PREFIX) for name in states))
    calls = ((BATCH, 0, QUERY), (BATCH, PAST, 1), (1, PAST, QUERY))
    samples = tuple(tuple(_causal_lm_call(calling, *sizes).values()) for sizes in calls)
    return Signature(inputs, outputs, dynamic, samples)


def _causal_lm_call(calling: CausalLMCall, batch: int, past: int, query: int) -> dict[str, Tensor]:
    """A call of `query` tokens after a cache of `past`, the first sequence padded on the left."""
    mask = torch.ones(batch, past + query, dtype=torch.long, device="cpu")
    mask[0, :PADDING] = 0
    tokens = {
        "input_ids": _made_up_ids(batch, query),
        "attention_mask": mask,
        # Not a view: export would guard on its base.
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -query:].clone(),
    }
    inputs = {name: tokens[name] for name in calling.inputs if name != KEPT}
    generator = torch.Generator().manual_seed(0)
    for layer, (heads, *widths) in enumerate(calling.cache_heads):
        for kind, width in zip(("key", "value"), widths, strict=True):
            inputs[f"{PAST_PREFIX}{layer}.{kind}"] = torch.randn(
                batch, heads, past, width, generator=generator, dtype=torch.float32, device="cpu"
            )
    return inputs


def _module(q: QuantizedModel, calling: ModuleCall, example_inputs: Any) -> Signature:
    if example_inputs is None:
        example_inputs = _token_example(calling)
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, Mapping) else (example_inputs, {})
    args = args if isinstance(args, (tuple, list)) else (args,)
    tensors = [_example(*pair) for pair in zip(calling.flatten(tuple(args), dict(kwargs)), calling.shapes, strict=True)]
    names = [name for index, name in enumerate(_leaf_names(calling.inputs, "input")) if index not in calling.constants]
    dynamic = {
        name: {dim: f"{name}_{dim}" for dim, size in enumerate(shape) if size is None}
        for name, shape in zip(names, calling.shapes, strict=True)
    }
    outputs = tuple(name if name not in names else f"{name}_out" for name in _leaf_names(calling.outputs, "output"))
    (results,) = next(iter(q.stored_graph.find_nodes(op="output"))).args
    for name, value in zip(outputs, results, strict=True):
        if not isinstance(value, fx.Node):
            raise ExportError(
                f"output {name} is {value!r}, which no ONNX graph returns: wrap the model in a module that returns its"
                " tensors alone, and quantize that"
            )
    return Signature(dict(zip(names, tensors, strict=True)), outputs, dynamic, (tuple(tensors),))


def _token_example(calling: ModuleCall) -> dict[str, Tensor]:
    if "input_ids" not in calling.names:
        raise ExportError(
            "example_inputs is missing: pass one call's inputs (a tensor, a tuple, or a dict by name), whose dtypes the"
            " exported graph keeps"
        )
    ids = _made_up_ids(BATCH, PAST)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    traced = calling.inputs.spec.context
    return {name: value for name, value in known.items() if name in traced}


def _made_up_ids(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length, dtype=torch.long, device="cpu").view(batch, length) % 7


def _example(tensor: Tensor, shape: Sequence[int | None]) -> Tensor:
    """In fp32 as the exported graph, free dimensions of 1 repeated to 2, since export would bake them in."""
    if not tensor.numel():
        raise ExportError(f"example_inputs hold an empty tensor {list(tensor.shape)}: pass one with elements")
    tensor = tensor.float() if tensor.dtype in NARROW else tensor
    repeats = [2 if free is None and size == 1 else 1 for free, size in zip(shape, tensor.shape, strict=True)]
    return tensor.repeat(repeats) if repeats else tensor


def _leaf_names(structure: Structure, default: str) -> list[str]:
    """Names of the leaves by their path, numbered where there is none or where two agree."""
    value = structure.unflatten(range(structure.spec.num_leaves))
    if isinstance(value, Mapping):  # an output class of transformers is one too
        value = dict(value)
    names: list[str] = []
    for index, (path, _) in enumerate(pytree.tree_flatten_with_path(value)[0]):
        name = re.sub(r"\W+", "_", pytree.keystr(path)).strip("_")
        name = f"{default}_{name}" if name.isdigit() else name or default
        names.append(name if name not in names else f"{name}_{index}")
    return names
