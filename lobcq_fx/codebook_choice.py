"""Which codebooks a model is quantized with: the universal ones, sets fitted to the model, or those of a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.calibration.fit import CodebookFit, fit_codebooks
from lobcq_fx.calibration.reservoir import Reservoir
from lobcq_fx.calibration.statistics import ActivationStatistics, scaled_sample
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CalibrationError, ConfigError
from lobcq_fx.format import (
    FormatSpec,
    absmax_tensor_scale,
    block_arrays,
    check_codebooks,
    encode,
    sqnr_db,
    universal_codebooks,
)
from lobcq_fx.plan import PlannedMatmul, PlannedWeight, QuantizationPlan

logger = logging.getLogger(__name__)

SAMPLED_ARRAYS = 1 << 15
"""Block arrays of all weights, and of all activations, that a fit looks at."""

ENOUGH_ARRAYS = 1 << 13
"""Sets fitted on fewer block arrays measured worse than the universal ones."""

HELD_OUT = 8
"""One of so many sampled arrays judges a fitted set, and is not fitted on."""

Progress = Callable[[str, int, int | None], None]

MatricesOf = Callable[[PlannedWeight], Iterable[Tensor]]

Statistics = Mapping[PlannedMatmul, ActivationStatistics]


@dataclass(frozen=True)
class ModelFit:
    """A set fitted to a model, and how it does against the universal one on arrays that it was not fitted on.

    fitted_db, universal_db: signal to quantization noise, the mean of weights and activations in dB.
    """

    fit: CodebookFit
    universal: Tensor
    fitted_db: float
    universal_db: float

    @property
    def is_better(self) -> bool:
        """Than the universal set."""
        return self.fitted_db > self.universal_db

    @property
    def codebooks(self) -> Tensor:
        """The better set, int8 [N_c, 16]."""
        return self.fit.codebooks if self.is_better else self.universal


def choose_codebooks(
    plan: QuantizationPlan,
    matrices_of: MatricesOf,
    statistics: Statistics,
    config: LobcqConfig,
    progress: Progress,
) -> CodebookSets:
    """Codebooks for every format that the plan uses.

    Args:
        plan: what is to be encoded.
        matrices_of: gives the matrices [N, K] of a weight as they are encoded, one if it is no stack.
        statistics: what was seen of the activations.
        config: which codebooks.
        progress: called with ("fit codebooks", iteration, None).

    Raises:
        CalibrationError: sets are to be fitted and a layer's observer saw no data.
        ConfigError: the file cannot be read or lacks a set.
    """
    if config.codebooks != "fitted":
        return given_codebooks(config, plan.formats)
    fitted = {spec: fit_to_model(plan, matrices_of, statistics, spec, progress).codebooks for spec in plan.formats}
    return CodebookSets(fitted, fitted)


def given_codebooks(config: LobcqConfig, formats: Iterable[FormatSpec]) -> CodebookSets:
    """The universal sets, or those of a file, as the settings want it: what needs no data.

    Raises:
        ConfigError: the file cannot be read or lacks a set.
    """
    if config.codebooks == "universal":
        return CodebookSets.universal(set(formats))
    shared = {spec: read_codebooks(Path(config.codebooks), spec) for spec in formats}
    return CodebookSets(shared, shared)


def read_codebooks(path: Path, spec: FormatSpec) -> Tensor:
    """The set for N_c codebooks of a JSON file that `lobcq calibrate` wrote, int8 [N_c, 16].

    Raises:
        ConfigError: the file is missing, malformed, or lacks that set.
    """
    try:
        sets = json.loads(path.read_text(encoding="utf-8"))["codebooks"]
        codebooks = torch.tensor(sets[str(spec.num_codebooks)], dtype=torch.int8, device="cpu")
        check_codebooks(codebooks, spec)
    except OSError as error:
        raise ConfigError(f"cannot read codebooks from {path}: {error.strerror}") from None
    except KeyError as error:
        raise ConfigError(f"{path} has no set {error}: write one with `lobcq calibrate --format {spec.name}`") from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{path} does not hold codebooks: {error}") from None
    return codebooks


def fit_to_model(
    plan: QuantizationPlan,
    matrices_of: MatricesOf,
    statistics: Statistics,
    spec: FormatSpec,
    progress: Progress,
) -> ModelFit:
    """One set for weights and activations alike, fitted to a bounded sample of both in equal parts, and judged.

    The arguments are those of `choose_codebooks`; it fits to what is encoded in the format `spec`.

    Raises:
        CalibrationError: a layer's observer saw no data.
    """
    matmuls = [matmul for matmul in plan.quantized if matmul.config.format == spec]
    encoded = [one for one in plan.quantized if one.config.activations == spec and one.config.mode == "w4a4"]
    samples = [
        _sampled(_weight_arrays([matmul.weight for matmul in matmuls if matmul.weight], matrices_of)),
        _sampled(_activation_arrays(encoded, statistics)),
    ]
    samples = [sample for sample in samples if len(sample)]
    if min(len(sample) for sample in samples) < ENOUGH_ARRAYS:
        logger.warning(
            "codebooks are fitted on only %s block arrays of weights and activations; on fewer than %d of each"
            " the universal ones are usually better",
            " and ".join(str(len(sample)) for sample in samples),
            ENOUGH_ARRAYS,
        )
    # Operands in units of their own tensor scales: the scale they have in common is 1.
    one = torch.ones((), dtype=torch.float32, device="cpu")
    held_out = [sample[::HELD_OUT] for sample in samples]
    fit = fit_codebooks(
        [sample[torch.arange(len(sample), dtype=torch.long, device="cpu") % HELD_OUT != 0] for sample in samples],
        spec,
        tensor_scale=one,
        on_iteration=lambda iteration, mse: progress("fit codebooks", iteration, None),
    )
    universal = universal_codebooks(spec.num_codebooks)
    fitted_db, universal_db = (
        sum(sqnr_db(sample, encode(sample, spec, codebooks, one)) for sample in held_out) / len(held_out)
        for codebooks in (fit.codebooks, universal)
    )
    found = ModelFit(fit, universal, fitted_db, universal_db)
    logger.warning(
        "%s: on arrays held out, the fitted codebooks reach %.2f dB, the universal ones %.2f dB: the %s ones are taken"
        " (a whole model may see it otherwise: compare with `lobcq eval`)",
        spec.name, fitted_db, universal_db, "fitted" if found.is_better else "universal",
    )  # fmt: skip
    return found


def _sampled(arrays: Iterator[Tensor]) -> Tensor:
    sample = Reservoir(SAMPLED_ARRAYS, seed=0)
    for chunk in arrays:
        sample.add(chunk)
    return sample.rows() if sample.num_seen else torch.empty(0, dtype=torch.float32, device="cpu")


def _weight_arrays(weights: Iterable[PlannedWeight], matrices_of: MatricesOf) -> Iterator[Tensor]:
    """Block arrays [n, L_A] of each distinct weight, divided by its tensor scale."""
    distinct = {weight.source: weight for weight in reversed(list(weights))}
    for weight in reversed(distinct.values()):
        for rows in matrices_of(weight):
            arrays = block_arrays(rows, weight.spec).flatten(0, 1)
            yield (arrays / absmax_tensor_scale(rows)).cpu()


def _activation_arrays(matmuls: Iterable[PlannedMatmul], statistics: Statistics) -> Iterator[Tensor]:
    """Each observer's sample, divided by the tensor scales that the layer will use."""
    seen = set()
    for matmul in matmuls:
        if matmul not in statistics:
            raise CalibrationError(f"no activation of {matmul.layer} was observed: pass calibration_data")
        if id(statistics[matmul]) not in seen:
            seen.add(id(statistics[matmul]))
            yield scaled_sample(statistics[matmul], matmul.config.activation_scale)
