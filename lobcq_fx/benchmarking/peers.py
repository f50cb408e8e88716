"""The linears of others that ours is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor

from lobcq_fx.benchmarking import onnx_peers, openvino_peers, torchao_peers
from lobcq_fx.benchmarking.contender import Contender
from lobcq_fx.benchmarking.torch_peers import torch_bf16, torch_fp32, torch_int4

RESEMBLES = 0.25
"""Relative error in norm of a peer's product: that of coarse 4-bit weights. What errs more is no linear."""


@dataclass(frozen=True)
class Peer:
    """Somebody else's linear.

    Args:
        name: in tables and results.
        make: from a weight, fp32 [N, K], and a number of threads. What it raises says why it cannot run.
        packages: that it imports.
    """

    name: str
    make: Callable[[Tensor, int], Contender]
    packages: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Its packages that are not installed."""
        return tuple(package for package in self.packages if find_spec(package) is None)


PEERS = (
    Peer("torch fp32", torch_fp32),
    Peer("torch bf16", torch_bf16),
    Peer("torch int4", torch_int4),
    Peer("ORT fp32", onnx_peers.ort_fp32, onnx_peers.PACKAGES),
    Peer("ORT int4", onnx_peers.ort_int4, onnx_peers.PACKAGES),
    Peer("OpenVINO int4", openvino_peers.openvino_int4, openvino_peers.PACKAGES),
    Peer("torchao int8", torchao_peers.torchao_int8, torchao_peers.PACKAGES),
    Peer("torchao codebook", torchao_peers.torchao_codebook, torchao_peers.PACKAGES),
)
