"""What each of several ranks does: it opens folders with the others, and notes what they give.

`python -m tests.integrations.ranks JOBS OUTPUT` forks them as JOBS says, after the imports, which take longest.
"""

from __future__ import annotations

import json
import os
import sys
from math import prod
from pathlib import Path

import torch
import transformers

from lobcq_fx.errors import LobcqError
from lobcq_fx.format import universal_codebooks
from lobcq_fx.modules.packed_product import PackedProduct
from lobcq_fx.modules.weight_part import WholeRows
from tests.integrations.models import GREEDY, IDS, results

ops = torch.ops.lobcq
ROW = 256
NOT_FINITE = (1, 3)
"""Rows that the last rank alone sees NaN and infinity in."""


def products(model):
    return [module for module in model.modules() if isinstance(module, PackedProduct)]


def weight_bytes(model):
    """Held by the packed weights, without scales of whole tensors and codebooks."""
    names = ("prepacked", "codes", "selectors", "scales")
    held = [getattr(one.packed, name, None) for one in products(model) for name in names]
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def zero_bytes(model):
    """Of them, what the block arrays take that stand for the rest of a row."""
    total = 0
    for one in products(model):
        if one.whole_rows is not None:
            spec, columns = one.packed.kernel_spec, one.settings.spec.array_size
            array = spec.code_bytes(columns) + spec.selector_bytes(columns) + spec.num_arrays(columns)
            total += prod(one.packed.stack) * one.out_features * array
    return total


def input_gradient(model):
    """Of the sum of squared logits, with respect to embeddings."""
    states = torch.randn(1, 4, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    states.requires_grad_()
    model(inputs_embeds=states.to(model.dtype)).logits.float().square().sum().backward()
    return states.grad


def found(folder, settings):
    """What a model gives, or why it cannot be opened."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    except LobcqError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    given = {"logits": results(model), "tokens": model.generate(IDS, **GREEDY)}
    given |= {"gradient": input_gradient(model), "bytes": weight_bytes(model), "zeros": zero_bytes(model)}
    try:
        model.save_pretrained(Path(folder).with_suffix(".again"))
    except LobcqError as error:
        given["when saved"] = str(error)
    return given


def activation():
    """[5, ROW], whose largest magnitudes are not all in one rank's part, two rows of it not finite."""
    x = torch.randn(5, ROW, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, ROW)
    x[NOT_FINITE[0], -1], x[NOT_FINITE[1], -2] = torch.nan, torch.inf
    return x


def encoded_part(rank, ranks):
    """A part of an activation, encoded in both ways, without what is appended to it."""
    width, world = ROW // ranks, torch.distributed.group.WORLD
    part = WholeRows(world, 64).largest_beside(activation()[:, rank * width : (rank + 1) * width])
    codes, selectors, scales, tensor_scale = ops.quantize_activation(part, universal_codebooks(8), 64)
    entries, int8_scales, int8_tensor_scale = ops.quantize_activation_int8(part, 64)
    return {
        "codes": codes[:, : width // 2],
        "selectors": selectors[:, : width * 3 // 64],
        "scales": scales[:, :-1].view(torch.uint8),
        "tensor_scale": tensor_scale,
        "entries": entries[:, :width],
        "int8_scales": int8_scales[:, :-1].view(torch.uint8),
        "int8_tensor_scale": int8_tensor_scale,
    }


def rank_of(rank, ranks, jobs, output):
    """Be one rank, and leave what the jobs give in OUTPUT/RANK."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}  # as torchrun does
    output.mkdir(exist_ok=True)
    store = f"file://{output}-store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    given = {name: found(**job) for name, job in jobs.items()}
    given["encoded"] = encoded_part(rank, ranks)
    torch.save(given, output / str(rank))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    jobs_file, where = (Path(given).absolute() for given in sys.argv[1:])
    torch.set_num_threads(1)
    for count, its_jobs in json.loads(jobs_file.read_text()).items():
        arguments = (int(count), its_jobs, where / count)
        torch.multiprocessing.start_processes(rank_of, arguments, nprocs=int(count), start_method="fork")
