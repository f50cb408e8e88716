"""Which passes run on a graph, and in which order: the one list, for every graph of a model and every target.

traced      `NORMALIZE`: FoldWeights, NormalizeContractions, NormalizeMatmuls; then the plan is made, and with
            calibration data InsertObservers
stored      `emitting`: Emit, ShareActivations; then EliminateDeadCode
CPU, CUDA   `lower`, from the stored graph; for quantized caches then `quantizing_cache`
ONNX        from the stored graph too: `lobcq_fx.export.folder`
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import fx

from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.kernels.bind import attends
from lobcq_fx.passes.annotate_values import AnnotateValues
from lobcq_fx.passes.attend_floats import AttendFloats
from lobcq_fx.passes.emit import Emit
from lobcq_fx.passes.fold_weights import FoldWeights
from lobcq_fx.passes.fuse_activation_encode import FuseActivationEncode
from lobcq_fx.passes.fuse_between_linears import FuseBetweenLinears
from lobcq_fx.passes.fuse_cached_attention import FuseCachedAttention
from lobcq_fx.passes.fuse_norm_encode import FuseNormEncode
from lobcq_fx.passes.fuse_residual import FuseResidual
from lobcq_fx.passes.group_query_heads import GroupQueryHeads
from lobcq_fx.passes.guard_attention import GuardAttention
from lobcq_fx.passes.guard_recurrence import GuardRecurrence
from lobcq_fx.passes.infra import GraphPass, Sequential
from lobcq_fx.passes.merge_siblings import MergeSiblings
from lobcq_fx.passes.normalize_contractions import NormalizeContractions
from lobcq_fx.passes.normalize_matmuls import NormalizeMatmuls
from lobcq_fx.passes.prepack import Prepack
from lobcq_fx.passes.quantize_cache import QuantizeCache
from lobcq_fx.passes.share_activations import ShareActivations
from lobcq_fx.plan import PlannedMatmul, QuantizationPlan
from lobcq_fx.refusal import Refusal

logger = logging.getLogger(__name__)

NORMALIZE = Sequential((FoldWeights(), NormalizeContractions(), NormalizeMatmuls()))
"""From a traced graph to one that a plan can be made of."""


GUARDS: tuple[GraphPass, ...] = (GuardAttention(), GuardRecurrence())
"""For graphs that come from files, whatever they run on."""


def emitting(plan: QuantizationPlan, codebooks: CodebookSets, rotated: AbstractSet[PlannedMatmul]) -> Sequential:
    """From a normalized graph to the one that is stored. `EliminateDeadCode` follows once all graphs are emitted."""
    return Sequential((Emit(plan, codebooks, rotated), ShareActivations()))


def lowering(device: torch.device, prepack: Prepack) -> tuple[GraphPass, ...]:
    """From a stored graph to the one that a device runs.

    On the CPU nothing is fused into linears; attention reads grouped heads unrepeated, that of one query in the core's
    own kernel, and norms and rotations are one call each. The fused attention of GPUs takes grouped heads only without
    a mask; there the encoders take over what comes before them.
    """
    if device.type == "cpu":
        return (prepack, MergeSiblings(), GroupQueryHeads(), AttendFloats(), FuseBetweenLinears(), *GUARDS)
    # Residuals before norms: a sum that a linear makes is not made again by the norm that follows.
    return (prepack, MergeSiblings(), FuseActivationEncode(), FuseResidual(), FuseNormEncode(), *GUARDS)


def quantizing_cache(quantize_cache: QuantizeCache, device: torch.device) -> tuple[GraphPass, ...]:
    """From a lowered graph for growing caches to one for quantized caches."""
    in_int8 = quantize_cache.cache.attention == "w4a8"
    if in_int8 or attends(device):
        return quantize_cache, FuseCachedAttention(in_int8)
    return (quantize_cache,)


def lower(graph_modules: Sequence[fx.GraphModule], prepack: Prepack, device: torch.device) -> tuple[Refusal, ...]:
    """Rewrite the graphs of a model in place for the kernels of a device.

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
    passes = Sequential(lowering(device, prepack))
    refusals = tuple(
        dict.fromkeys(refusal for graph_module in graph_modules for refusal in passes(graph_module).refusals)
    )
    for refusal in refusals:
        logger.info("%s", refusal)
    return refusals
