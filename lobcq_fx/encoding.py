"""Encode the weights of a plan one by one, and put what `Emit` will read into the model's graph module."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.calibration.encode_weight import encode_stacked_weight, encode_weight
from lobcq_fx.calibration.groups import GroupMoments, Moments
from lobcq_fx.calibration.rounding_error import encoded_sample
from lobcq_fx.calibration.statistics import ActivationStatistics
from lobcq_fx.float_weights import FloatWeights
from lobcq_fx.format import Encoded, EncodedStack, sqnr_db
from lobcq_fx.format.error import sqnr_db_of
from lobcq_fx.format.spec import ENTRY_MAX, INT8_MAX
from lobcq_fx.graph.attributes import delete_attribute, device_of, get_attribute, has_attribute, register_attribute
from lobcq_fx.inventory import MatmulRecord
from lobcq_fx.modules.packed_weight import PackedWeight
from lobcq_fx.plan import PlannedMatmul, PlannedWeight, QuantizationPlan


@dataclass(frozen=True)
class EncodedWeight:
    """A weight's size and error. float_bytes: what was let go, 0 where the float weight stays for something else."""

    float_bytes: int
    packed_bytes: int
    sqnr_db: float


def encode_weights(
    plan: QuantizationPlan,
    weights: FloatWeights,
    codebooks: CodebookSets,
    moments: Iterable[tuple[PlannedWeight, Moments | None]] | None = None,
    release_from: nn.Module | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[PlannedWeight, EncodedWeight]:
    """Encode every weight of the plan; each float weight is let go before the next one is encoded.

    Args:
        plan: made of the weights' graph module.
        weights: the float ones. Their graph module gets the packed ones and the codebooks; its graph goes on naming
            float weights that are gone until `Emit` has run.
        codebooks: the sets to encode with.
        moments: each weight of the plan once, in the order to encode them, with the second moments by which its errors
            are compensated, or None. Without any, all are rounded to the nearest, in execution order.
        release_from: the float model, whose weights are freed as they are encoded; None keeps them.
        progress: called with (weights encoded, weights in all).

    Raises:
        LobcqError: a weight holds NaN or infinity (names the weight and the first bad index).
        CalibrationError: second moments hold NaN or infinity.
    """
    graph_module = weights.graph_module
    register_codebooks(graph_module, codebooks)
    done: dict[PlannedWeight, EncodedWeight] = {}
    for weight, seen in moments if moments is not None else ((one, None) for one in plan.weights):
        encoded, noise = encode_planned(weight, partial(weights.matrices, weight), codebooks, seen)
        let_go = let_go_of(weight, graph_module, release_from)
        register_attribute(graph_module, weight.stored, PackedWeight(encoded))
        done[weight] = EncodedWeight(let_go, encoded.nbytes, noise)
        if progress is not None:
            progress(len(done), len(plan.weights))
    return done


def encode_planned(
    planned: PlannedWeight,
    matrices: Callable[[], Iterator[Tensor]],
    codebooks: CodebookSets,
    moments: Moments | None = None,
) -> tuple[Encoded | EncodedStack, float]:
    """Encode one weight of a plan; and how well it is kept, in dB.

    matrices: gives those of a stack, [N, K] each, or the one that another weight is.

    Raises:
        LobcqError, CalibrationError: as `encode_weights`.
    """
    used = planned.spec, codebooks.weights[planned.spec], planned.source
    if planned.stacked:
        assert not isinstance(moments, Tensor)
        stack = encode_stacked_weight(matrices(), *used, moments)
        squares = [_squares(one, stack.matrix(index)) for index, one in enumerate(matrices())]
        return stack, sqnr_db_of(torch.cat(squares))
    assert not isinstance(moments, GroupMoments)
    (weight,) = matrices()
    encoded = encode_weight(weight, *used, moments)
    return encoded, sqnr_db_of(_squares(weight, encoded))


def _squares(weight: Tensor, w: Encoded) -> Tensor:
    parts = (w.codes, w.selectors, w.scales, w.tensor_scale, w.codebooks)
    squares: Tensor = torch.ops.lobcq.weight_squares(weight, *parts, w.spec.array_size)
    return squares


def register_codebooks(graph_module: fx.GraphModule, codebooks: CodebookSets) -> None:
    """Put the sets into a graph module, where `Emit` reads them."""
    device = device_of(graph_module)
    for name, tensor in codebooks.named().items():
        if not has_attribute(graph_module, name):
            register_attribute(graph_module, name, tensor.to(device))


def let_go_of(planned: PlannedWeight, graph_module: fx.GraphModule, release_from: nn.Module | None = None) -> int:
    """Take a float weight out of its graph module, if nothing else reads it; how many bytes that are.

    release_from: has it too, and loses its memory.
    """
    if planned.keeps_float:
        return 0
    size: int = get_attribute(graph_module, planned.source).nbytes
    delete_attribute(graph_module, planned.source)
    if release_from is not None and has_attribute(release_from, planned.source):  # else it was computed from others
        owned = get_attribute(release_from, planned.source)
        owned.data = owned.data.new_empty(0)
    return size


def register_static_scales(
    plan: QuantizationPlan,
    graph_module: fx.GraphModule,
    statistics: Mapping[PlannedMatmul, ActivationStatistics],
) -> None:
    """Put the static scales of the plan into the graph module.

    Raises:
        CalibrationError: a layer saw no calibration data.
    """
    for matmul in plan.quantized:
        if matmul.static_scale is not None:
            assert matmul in statistics, "static scales need observers: run insert_observers and calibrate first"
            scale = statistics[matmul].static_tensor_scale(INT8_MAX if matmul.config.mode == "w4a8" else ENTRY_MAX)
            register_attribute(graph_module, matmul.static_scale, scale.to(device_of(graph_module)))


def records_of(
    plan: QuantizationPlan,
    encoded: Mapping[PlannedWeight, EncodedWeight],
    codebooks: CodebookSets,
    statistics: Mapping[PlannedMatmul, ActivationStatistics],
    smoothing: Mapping[PlannedMatmul, str] | None = None,
    rotated: Container[PlannedMatmul] = (),
) -> tuple[MatmulRecord, ...]:
    """What became of every matmul; a weight's bytes are counted with the first that reads it."""
    seen: set[PlannedWeight] = set()
    records = []
    for matmul in plan.matmuls:
        weight = matmul.weight
        if weight is None:
            records.append(left_alone(matmul))
            continue
        first, result, activations = weight not in seen, encoded[weight], matmul.config.activation_format
        seen.add(weight)
        records.append(
            MatmulRecord(
                matmul.layer,
                matmul.operation,
                weight.shape,
                format=matmul.config.format.name,
                mode=matmul.config.mode,
                activation_format=None if activations is None else activations.name,
                smoothing=(smoothing or {}).get(matmul),
                rotated=matmul in rotated,
                float_bytes=result.float_bytes if first else 0,
                packed_bytes=result.packed_bytes if first else 0,
                weight_sqnr_db=result.sqnr_db,
                activation_sqnr_db=_activation_sqnr_db(matmul, codebooks, statistics.get(matmul)),
                multiply_adds=matmul.multiply_adds,
                unreached=_unreached(statistics.get(matmul)),
                undersampled=_undersampled(matmul, statistics.get(matmul)),
            )
        )
    return tuple(records)


def _unreached(statistics: ActivationStatistics | None) -> int | None:
    if statistics is None or statistics.group_rows is None:
        return None
    return int((statistics.group_rows == 0).sum())


def _undersampled(matmul: PlannedMatmul, statistics: ActivationStatistics | None) -> int | None:
    by_expert = matmul.compensated or matmul.config.smoothing != "none"
    return statistics.undersampled if by_expert and statistics is not None else None


def left_alone(matmul: PlannedMatmul) -> MatmulRecord:
    """The record of a matmul that stays in float."""
    return MatmulRecord(
        matmul.layer,
        matmul.operation,
        matmul.shape if matmul.shape is not None and (matmul.grouped or len(matmul.shape) == 2) else None,
        matmul.refusal,
        float_bytes=matmul.float_bytes,
        packed_bytes=matmul.float_bytes,
        multiply_adds=matmul.multiply_adds,
        excluded=matmul.asked,
    )


def _activation_sqnr_db(
    matmul: PlannedMatmul, codebooks: CodebookSets, statistics: ActivationStatistics | None
) -> float | None:
    """On the observer's sample, in the scales that the layer will use; None if nothing was observed."""
    if statistics is None or not statistics.seen or matmul.config.mode == "w4a16":
        return None
    spec, scale = matmul.config.activations, matmul.config.activation_scale
    return sqnr_db(*encoded_sample(statistics, spec, matmul.config.mode, scale, codebooks.activations[spec]))
