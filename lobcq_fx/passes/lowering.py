"""The passes between a graph on stored weights and what the kernels of a device run."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import fx

from lobcq_fx.passes.annotate_values import AnnotateValues
from lobcq_fx.passes.fuse_activation_encode import FuseActivationEncode
from lobcq_fx.passes.fuse_norm_encode import FuseNormEncode
from lobcq_fx.passes.fuse_residual import FuseResidual
from lobcq_fx.passes.group_query_heads import GroupQueryHeads
from lobcq_fx.passes.infra import Sequential
from lobcq_fx.passes.merge_siblings import MergeSiblings
from lobcq_fx.passes.prepack import Prepack
from lobcq_fx.passes.prepacked_calls import Refusal

logger = logging.getLogger(__name__)


def lower(graph_module: fx.GraphModule, prepack: Prepack, device: torch.device) -> tuple[Refusal, ...]:
    """Rewrite the graph in place for the kernels of a device.

    On the CPU nothing is fused into linears, and attention reads grouped heads unrepeated. The fused attention of GPUs
    takes those only without a mask; there the encoders take over what comes before them.

    Args:
        graph_module: the graph on stored weights.
        prepack: with the device's weight layout.
        device: where the graph's tensors are.

    Returns:
        What a pass left as it was, and why; the log has it too, at level INFO.
    """
    merge = MergeSiblings()
    if device.type == "cpu":
        Sequential((prepack, merge, GroupQueryHeads()))(graph_module)
        return _said(merge.refusals)
    activation, residual, norm = FuseActivationEncode(), FuseResidual(), FuseNormEncode()
    # Residuals before norms: a sum that a linear makes is not made again by the norm that follows.
    Sequential((AnnotateValues(device), prepack, merge, activation, residual, norm))(graph_module)
    return _said(merge.refusals, activation.refusals, residual.refusals, norm.refusals)


def _said(*refusals: Iterable[Refusal]) -> tuple[Refusal, ...]:
    found = tuple(refusal for several in refusals for refusal in several)
    for refusal in found:
        logger.info("%s", refusal)
    return found
