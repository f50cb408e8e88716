"""The LO-BCQ codebook fit: blocks to codebooks, codebooks to their blocks, until the error settles.

Source: Elangovan et al., arXiv 2502.05376, section 2.3. Everything happens on the format's grid (docs/format.md
step 3), where a cluster of any number of scalars is a histogram; so memory does not grow with the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lobcq_fx.calibration.block_sums import block_sums
from lobcq_fx.calibration.grid_blocks import GridBlocks
from lobcq_fx.calibration.lloyd_max import NUM_BINS, lloyd_max, squared_errors
from lobcq_fx.calibration.reservoir import Reservoir
from lobcq_fx.calibration.seeding import cluster_histograms, kmeans_plus_plus, random_codebooks
from lobcq_fx.calibration.single_thread import single_thread
from lobcq_fx.format.spec import BLOCK_SIZE, CODEBOOK_SIZE, ENTRY_MAX, GRID, GRID_MAX, FormatSpec

SEEDING_BLOCKS = 1 << 15
"""Blocks sampled from the source for k-means++."""


@dataclass(frozen=True)
class CodebookFit:
    """Fitted codebooks and what the fit cost. Errors are mean squares in units of an entry (1 = one INT6 step).

    codebooks: int8 [N_c, 16], each row sorted ascending.
    mse_history: error of the float codebooks, at the start and after each iteration; never rises.
    mse_rounded: error of `codebooks`.
    converged: the last iteration gained less than the tolerance.
    num_blocks: blocks fitted on, those of all-zero arrays not counted.
    """

    codebooks: Tensor
    mse_history: tuple[float, ...]
    mse_rounded: float
    converged: bool
    num_blocks: int

    @property
    def iterations(self) -> int:
        """How many times the codebooks were updated."""
        return len(self.mse_history) - 1

    @property
    def rounding_cost_db(self) -> float:
        """Decibels lost by rounding the entries to INT6; 0 where there was no error before."""
        before = self.mse_history[-1]
        return 10 * math.log10(self.mse_rounded / before) if before > 0 and self.mse_rounded > 0 else 0.0


@dataclass(frozen=True)
class _Clusters:
    """What one pass over the blocks leaves behind.

    histograms: int64 [N_c, NUM_BINS] of each cluster's scalars.
    worst: int64 [8], the block with the largest error, and the cluster it is in.
    """

    histograms: Tensor
    squared_error: float
    worst: Tensor
    worst_cluster: int
    num_blocks: int

    @property
    def mse(self) -> float:
        return self.squared_error / (max(self.num_blocks, 1) * BLOCK_SIZE * GRID**2)


def fit_codebooks(
    arrays: Tensor | Iterable[Tensor],
    spec: FormatSpec,
    *,
    tensor_scale: Tensor | None = None,
    init: Literal["kmeans++", "random"] = "kmeans++",
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
    on_iteration: Callable[[int, float], None] | None = None,
) -> CodebookFit:
    """Fit N_c codebooks to block arrays.

    Args:
        arrays: float [n, L_A], or an iterable of such tensors that can be iterated again and again (a list, a data
            set's view): memory stays bounded however long it is. All are taken as one operand. To mix operands
            with scales of their own, divide each by its tensor scale and pass `tensor_scale=torch.tensor(1.0)`.
        spec: N_c and L_A.
        tensor_scale: fp32 []; None for the weight rule over all arrays.
        init: "kmeans++" over normalised blocks, as in the paper, or "random" entries.
        max_iterations: codebook updates at most.
        tolerance: stop once an iteration lowers the error by less than this share of it.
        seed: fixes the start; the rest is deterministic.
        on_iteration: called with (iteration, mse) after each pass over the data, iteration 0 being the start.

    Returns:
        The fit. Data of zeros only give evenly spaced entries and an error of 0.

    Raises:
        CalibrationError: no arrays, a wrong shape, a source that can be read only once, NaN or infinity.
        ValueError: an unknown init.
    """
    blocks = GridBlocks(arrays, spec, tensor_scale)
    codebooks = _start(blocks, spec.num_codebooks, init, seed)
    history: list[float] = []
    while True:
        clusters = _assign(blocks, squared_errors(codebooks))
        history.append(clusters.mse)
        if on_iteration is not None:
            on_iteration(len(history) - 1, clusters.mse)
        converged = len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-2]
        if converged or len(history) > max_iterations:
            break
        codebooks = lloyd_max(clusters.histograms, _revive_empty(codebooks, clusters))
    rounded = round_entries(codebooks)
    mse_rounded = _assign(blocks, squared_errors(rounded.double() * GRID)).mse
    return CodebookFit(rounded, tuple(history), mse_rounded, converged, clusters.num_blocks)


def round_entries(codebooks: Tensor) -> Tensor:
    """Entries in grid steps, fp64 [N, 16], to INT6: int8 [N, 16] in [-31, 31], each row sorted ascending."""
    return (codebooks / GRID).round().clamp(-ENTRY_MAX, ENTRY_MAX).to(torch.int8).sort(dim=1).values


def _start(blocks: GridBlocks, num_codebooks: int, init: str, seed: int) -> Tensor:
    if init not in ("kmeans++", "random"):
        raise ValueError(f"init={init!r}: use 'kmeans++' or 'random'")
    generator = torch.Generator().manual_seed(seed)
    if init == "random":
        return random_codebooks(num_codebooks, generator)
    reservoir = Reservoir(SEEDING_BLOCKS, seed)
    for chunk in blocks:
        reservoir.add(chunk)
    if reservoir.num_seen == 0:
        even = torch.linspace(-ENTRY_MAX * GRID, ENTRY_MAX * GRID, CODEBOOK_SIZE, dtype=torch.float64, device="cpu")
        return even.repeat(num_codebooks, 1)
    return kmeans_plus_plus(reservoir.rows(), num_codebooks, generator)


def _assign(blocks: GridBlocks, errors: Tensor) -> _Clusters:
    """Step (i): each block to the codebook with the least error, a tie to the lowest.

    Args:
        blocks: the data.
        errors: fp64 [NUM_BINS, N_c], of each grid value with each codebook.
    """
    num_codebooks = errors.shape[1]
    histograms = torch.zeros((num_codebooks, NUM_BINS), dtype=torch.long, device="cpu")
    worst = torch.zeros(BLOCK_SIZE, dtype=torch.long, device="cpu")
    worst_cluster, largest, num_blocks = 0, 0.0, 0
    for chunk in blocks:
        if chunk.shape[0] == 0:
            continue
        with single_thread():
            least, cluster = block_sums(chunk.int() + GRID_MAX, errors).min(dim=1)
            histograms += cluster_histograms(chunk, cluster, num_codebooks)
            position = int(least.argmax())
        num_blocks += chunk.shape[0]
        if float(least[position]) > largest:
            worst, worst_cluster, largest = chunk[position].long(), int(cluster[position]), float(least[position])
    with single_thread():
        squared_error = float((histograms.double() * errors.t()).sum())
    return _Clusters(histograms, squared_error, worst, worst_cluster, num_blocks)


def _revive_empty(codebooks: Tensor, clusters: _Clusters) -> Tensor:
    """Give one codebook that no block chose to the block served worst.

    Its 8 scalars become entries, beside every other entry of the codebook it used so far. A codebook that nobody uses
    can be changed without raising the error; one an iteration, so that the next one sees what this one changed.
    """
    empty = (clusters.histograms.sum(dim=1) == 0).nonzero().flatten()
    if empty.numel() == 0 or clusters.squared_error == 0:
        return codebooks
    revived = torch.cat((clusters.worst.double(), codebooks[clusters.worst_cluster, ::2]))
    codebooks = codebooks.clone()
    codebooks[empty[0]] = revived.sort().values
    return codebooks
