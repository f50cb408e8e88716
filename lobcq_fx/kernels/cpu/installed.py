"""The C++ core of this installation, and the look-up tables that it shares among all models of the process."""

from __future__ import annotations

import logging
import os
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec, check_codebooks
from lobcq_fx.kernels.cpu import library
from lobcq_fx.kernels.cpu.build import SUFFIX
from lobcq_fx.kernels.cpu.library import Core
from lobcq_fx.kernels.cpu.operands import Tables

logger = logging.getLogger(__name__)

SWITCH = "LOBCQ_CPU_CORE"
"""Environment variable: "0" leaves the core out, the path of another build takes that one."""


@cache
def cpu_core() -> Core | None:
    """The core that was built when the package was installed; None, said once, where there is none or it is off."""
    wanted = os.environ.get(SWITCH)
    if wanted == "0":
        return None
    path = Path(wanted) if wanted else Path(library.__file__).with_name(f"_core{SUFFIX}")
    if not (wanted or path.exists()):
        logger.warning("the CPU core was not built, the ops run through plain torch: reinstall with a C++ compiler")
        return None
    try:
        return Core(path, library.torch_parallel_for())
    except OSError as error:
        logger.warning("the CPU core cannot be loaded, the ops run through plain torch: %s", error)
        return None


def tables_of(codebooks: Tensor) -> Tables:
    """Look-up tables of codebooks int8 [N_c, 16], made once for each set."""
    return _tables(tuple(codebooks.flatten().tolist()), tuple(codebooks.shape), codebooks.dtype)


@lru_cache(maxsize=32)
def _tables(entries: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tables:
    codebooks = torch.tensor(entries, dtype=dtype, device="cpu").view(shape)
    check_codebooks(codebooks, FormatSpec(shape[0]))
    core = cpu_core()
    assert core is not None, "bound without a core"
    return core.tables(codebooks)
