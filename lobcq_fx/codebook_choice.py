"""Which codebooks a model is quantized with: the universal ones, sets fitted to the model, or those of a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, fx

from lobcq_fx.calibration.codebook_sets import CodebookSets
from lobcq_fx.calibration.fit import CodebookFit, fit_codebooks
from lobcq_fx.calibration.reservoir import Reservoir
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CalibrationError, ConfigError
from lobcq_fx.format import FormatSpec, absmax_tensor_scale, block_arrays, check_codebooks
from lobcq_fx.graph.attributes import get_attribute
from lobcq_fx.graph.matmuls import Matmul, find_matmuls
from lobcq_fx.passes.insert_observers import observer_of, scaled_sample

logger = logging.getLogger(__name__)

SAMPLED_ARRAYS = 1 << 15
"""Block arrays of all weights, and of all activations, that a fit looks at."""

ENOUGH_ARRAYS = 1 << 13
"""Sets fitted on fewer block arrays measured worse than the universal ones."""

Progress = Callable[[str, int, int | None], None]


def choose_codebooks(graph_module: fx.GraphModule, config: LobcqConfig, progress: Progress) -> CodebookSets:
    """Codebooks for every format that the graph's matmuls will use.

    Raises:
        CalibrationError: sets are to be fitted and a layer's observer saw no data.
        ConfigError: the file cannot be read or lacks a set.
    """
    matmuls = [matmul for matmul in find_matmuls(graph_module, config) if matmul.refusal is None]
    formats = sorted({matmul.config.format for matmul in matmuls}, key=lambda spec: spec.name)
    if config.codebooks == "universal":
        return CodebookSets.universal(set(formats))
    if config.codebooks == "fitted":
        fitted = {spec: fit_to_model(graph_module, config, spec, progress).codebooks for spec in formats}
        return CodebookSets(fitted, fitted)
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
    graph_module: fx.GraphModule, config: LobcqConfig, spec: FormatSpec, progress: Progress
) -> CodebookFit:
    """One set for weights and activations alike, fitted to a bounded sample of both in equal parts.

    Args:
        graph_module: normalized, with observers that saw calibration data.
        config: which matmuls there are.
        spec: fits those of this format.
        progress: called with ("fit codebooks", iteration, None).

    Raises:
        CalibrationError: a layer's observer saw no data.
    """
    matmuls = [m for m in find_matmuls(graph_module, config) if m.refusal is None and m.config.format == spec]
    samples = [
        _sampled(_weight_arrays(graph_module, matmuls, spec)),
        _sampled(_activation_arrays(graph_module, [m for m in matmuls if m.config.mode == "w4a4"])),
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
    return fit_codebooks(
        samples,
        spec,
        tensor_scale=torch.ones((), dtype=torch.float32, device="cpu"),
        on_iteration=lambda iteration, mse: progress("fit codebooks", iteration, None),
    )


def _sampled(arrays: Iterator[Tensor]) -> Tensor:
    sample = Reservoir(SAMPLED_ARRAYS, seed=0)
    for chunk in arrays:
        sample.add(chunk)
    return sample.rows() if sample.num_seen else torch.empty(0, dtype=torch.float32, device="cpu")


def _weight_arrays(graph_module: fx.GraphModule, matmuls: list[Matmul], spec: FormatSpec) -> Iterator[Tensor]:
    """Block arrays [n, L_A] of each distinct weight, divided by its tensor scale."""
    seen: set[str] = set()
    for matmul in matmuls:
        assert matmul.weight is not None
        name = str(matmul.weight.target)
        if name in seen:
            continue
        seen.add(name)
        weight = get_attribute(graph_module, name).detach()
        rows = weight.t() if matmul.flipped else weight
        arrays = block_arrays(rows, spec).flatten(0, 1)
        yield (arrays / absmax_tensor_scale(rows)).cpu()


def _activation_arrays(graph_module: fx.GraphModule, matmuls: list[Matmul]) -> Iterator[Tensor]:
    """Each observer's sample, divided by the tensor scales that the layer will use."""
    seen = set()
    for matmul in matmuls:
        observer = observer_of(graph_module, matmul)
        if observer is None:
            raise CalibrationError(f"no activation of {matmul.layer} was observed: pass calibration_data")
        if id(observer) not in seen:
            seen.add(id(observer))
            yield scaled_sample(observer.statistics, matmul.config)
