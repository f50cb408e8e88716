"""What is handed in as a model: wrappers come off, and what is none is refused by its type."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lobcq_fx.errors import TraceError


def unwrapped(model: Any) -> nn.Module:
    """The module inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers.

    Raises:
        TraceError: it is no module that can be captured; says what to pass instead.
    """
    inner = _inner(model)
    if inner is not None:
        return unwrapped(inner)
    remedy = _remedy(model)
    if remedy is not None:
        raise TraceError(f"cannot trace a {type(model).__name__}: {remedy}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise TraceError(
                f"cannot trace {type(model).__name__}: {name} is on the meta device, without values. Remedy: load the"
                " weights first (to_empty() and load_state_dict(), or from_pretrained() without a device map)"
            )
    assert isinstance(model, nn.Module)
    return model


def _inner(model: Any) -> nn.Module | None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        module: nn.Module = model.module
        return module
    compiled = getattr(model, "_orig_mod", None)  # of torch.compile, whose class is imported with its compiler
    return compiled if isinstance(compiled, nn.Module) else None


def _remedy(model: Any) -> str | None:
    """What to do about something that cannot be captured whatever it computes; None for anything else."""
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        return "torch.jit has compiled it. Remedy: pass the Python module that it was made from"
    if isinstance(model, ExportedProgram) or (isinstance(model, fx.GraphModule) and "eval" in vars(model)):
        return "torch.export has captured it already. Remedy: pass the Python module that it was exported from"
    if type(model).__module__.partition(".")[0] == "peft":
        return "it is an adapter around a model. Remedy: merge it in, and pass model.merge_and_unload()"
    if hasattr(model, "lobcq_config"):
        return "it is quantized already. Remedy: pass the float model"
    if isinstance(model, type):
        return "it is a class. Remedy: pass an instance of it, with its weights"
    if not isinstance(model, nn.Module):
        return "it is no torch.nn.Module. Remedy: pass a module, or wrap the function in one"
    return None
