"""The passes between a graph on stored weights and what the kernels of a device run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import fx

from lobcq_fx.graph.prepacked_calls import Refusal
from lobcq_fx.passes.annotate_values import AnnotateValues
from lobcq_fx.passes.fuse_activation_encode import FuseActivationEncode
from lobcq_fx.passes.fuse_norm_encode import FuseNormEncode
from lobcq_fx.passes.fuse_residual import FuseResidual
from lobcq_fx.passes.group_query_heads import GroupQueryHeads
from lobcq_fx.passes.infra import Sequential
from lobcq_fx.passes.merge_siblings import MergeSiblings
from lobcq_fx.passes.prepack import Prepack

logger = logging.getLogger(__name__)


def lower(graph_modules: Sequence[fx.GraphModule], prepack: Prepack, device: torch.device) -> tuple[Refusal, ...]:
    """Rewrite the graphs of a model in place for the kernels of a device.

    On the CPU nothing is fused into linears, and attention reads grouped heads unrepeated. The fused attention of GPUs
    takes those only without a mask; there the encoders take over what comes before them.

    Args:
        graph_modules: graphs on the same stored weights.
        prepack: with the device's weight layout.
        device: where the tensors are.

    Returns:
        What a pass left as it was, and why; the log has it too, at level INFO.
    """
    if device.type != "cpu":
        for graph_module in graph_modules:  # all of them while weights are as stored, which this reads
            AnnotateValues(device)(graph_module)
    lower_one = _for_cpu if device.type == "cpu" else _for_gpu
    refusals = tuple(refusal for graph_module in graph_modules for refusal in lower_one(graph_module, prepack))
    for refusal in dict.fromkeys(refusals):
        logger.info("%s", refusal)
    return refusals


def _for_cpu(graph_module: fx.GraphModule, prepack: Prepack) -> list[Refusal]:
    merge = MergeSiblings()
    Sequential((prepack, merge, GroupQueryHeads()))(graph_module)
    return merge.refusals


def _for_gpu(graph_module: fx.GraphModule, prepack: Prepack) -> list[Refusal]:
    merge, activation, residual, norm = MergeSiblings(), FuseActivationEncode(), FuseResidual(), FuseNormEncode()
    # Residuals before norms: a sum that a linear makes is not made again by the norm that follows.
    Sequential((prepack, merge, activation, residual, norm))(graph_module)
    return [*merge.refusals, *activation.refusals, *residual.refusals, *norm.refusals]
