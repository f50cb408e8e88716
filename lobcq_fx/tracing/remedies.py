"""What to do about what stopped a capture, by what stopped it."""

from __future__ import annotations

import re

BRANCHES = (
    "make that line independent of tensor values (torch.where instead of if, no .item(), no loop over data), pass"
    " example_inputs that take the intended branch, or quantize the submodules around it one by one"
)

REMEDIES = (
    (
        r"padding token",
        "set model.config.pad_token_id (tracing needs a batch of at least 2, for which the model needs it)",
    ),
    (
        r"Found <class .*> in output|not pytree-flattenable",
        "return tensors, or tuples, lists and dicts of them, from a module that wraps this one",
    ),
    (r"same device|two devices", "move the model and example_inputs to one device"),
    (r"ImportError|ModuleNotFoundError", "install what the model needs"),
    (r"OutOfMemoryError", "trace with a smaller example, or on the CPU, where the weights need not be copied"),
    (
        r"data-dependent|DataDependent|control flow|UserError|Unsupported|[Gg]uard|_local_scalar_dense",
        BRANCHES,
    ),
    (
        r"^(Index|Key|Attribute|Type|Value|Runtime|Assertion|NotImplemented)Error",
        "call the float model itself with example_inputs, with a batch of 2, and mend what fails there; if that works, "
        + BRANCHES,
    ),
)
"""Patterns of "Type: message", the first that is found counts; and what helps."""


def remedy_for(error: Exception) -> str:
    """What the caller can do about an error that stopped a capture."""
    text = f"{type(error).__name__}: {error}"
    return next((remedy for pattern, remedy in REMEDIES if re.search(pattern, text)), BRANCHES)
