"""torchao's linears, eager. torchao is imported inside the functions: it is not needed to use this package."""

from __future__ import annotations

import copy as copying
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lobcq_fx.benchmarking.contender import Call, Contender

PACKAGES = ("torchao",)

FIT_SCALARS = 1 << 15
"""torchao fits codebooks to a whole weight, which takes minutes; on a part it finds codebooks as good to time with."""

ASSIGN_CHUNK = 1 << 18
"""Scalars that are compared with all codebook entries at once."""


def torchao_int8(weight: Tensor, _threads: int) -> Contender:
    """int8 weights, activations quantized to int8 for each token."""
    with _quietly():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        model[0].weight = nn.Parameter(weight.clone(), requires_grad=False)
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    quantized = model[0]

    def copy() -> Call:
        return copying.deepcopy(quantized)

    return Contender(weight.numel(), copy)


def torchao_codebook(weight: Tensor, _threads: int) -> Contender:
    """The prototype `CodebookWeightOnlyConfig`: 4-bit codes into one 16-entry codebook, a scale for each row.

    It has no kernel of its own: each call decodes the weight to fp32 and multiplies.
    """
    with _quietly():
        from torchao.prototype.dtypes.uintx.uintx_utils import UintxTensor
        from torchao.prototype.quantization.codebook import CodebookQuantizedTensor
        from torchao.prototype.quantization.codebook.codebook_ops import choose_qparams_codebook, quantize_codebook

        scalar, code = (1, 1), torch.uint4  # type: ignore[attr-defined]
        columns = weight.shape[1]
        codebook, _ = choose_qparams_codebook(weight[: max(1, FIT_SCALARS // columns)], scalar, columns, code)
        scales = weight.amax(dim=1).clamp(min=1e-9).view(-1, 1, 1)  # its rule for scalar codes
        codes = quantize_codebook(weight, codebook, scales, ASSIGN_CHUNK, code)

    def copy() -> Call:
        packed = UintxTensor.from_uint8(codes, code)
        own = CodebookQuantizedTensor(packed, codebook, scalar, scales, weight.shape, dtype=weight.dtype)
        return lambda x: nn.functional.linear(x, own)

    # It goes through the decoded weight too, which is larger than the caches.
    return Contender(weight.nbytes, copy)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torchao says about extensions for other devices and about parts of torch that it uses."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
