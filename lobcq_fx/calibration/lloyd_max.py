"""Lloyd-Max quantizers of histograms on the format's grid: one-dimensional k-means, exact and O(entries) a step.

Normalised scalars are integers (docs/format.md, step 3): a histogram loses nothing, and with prefix sums of
counts and of first moments a step costs two look-ups an entry however many scalars were counted. Entries here are fp64
in grid steps; sums are of integers below 2**53 and therefore exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.calibration.single_thread import single_thread
from lobcq_fx.format.spec import CODEBOOK_SIZE, GRID_MAX

NUM_BINS = 2 * GRID_MAX + 1
"""Bin i of a histogram counts grid value i - GRID_MAX."""

MAX_STEPS = 100
SETTLED = 1e-3
"""Grid steps (1/16 of a unit): Lloyd-Max stops once no entry moves further than this."""


@single_thread()
def squared_errors(codebooks: Tensor) -> Tensor:
    """Squared distance from each grid value to its nearest entry.

    Args:
        codebooks: fp64 [N, 16] in grid steps, each row sorted ascending.

    Returns:
        fp64 [NUM_BINS, N], in squared grid steps.
    """
    grid = torch.arange(-GRID_MAX, GRID_MAX + 1, dtype=torch.float64, device="cpu")
    grid = grid.expand(codebooks.shape[0], -1).contiguous()
    nearest = torch.searchsorted(_midpoints(codebooks), grid)
    return (grid - codebooks.gather(1, nearest)).square().t().contiguous()


@single_thread()
def lloyd_max(histograms: Tensor, codebooks: Tensor) -> Tensor:
    """Improve each codebook for its own histogram until it settles; the squared error never rises.

    Args:
        histograms: int64 [N, NUM_BINS].
        codebooks: fp64 [N, 16] to start from, in grid steps, each row sorted ascending.

    Returns:
        fp64 [N, 16], sorted ascending. An entry that is nearest to no scalar stays where it was.
    """
    grid = torch.arange(-GRID_MAX, GRID_MAX + 1, dtype=torch.long, device="cpu")
    counts = torch.nn.functional.pad(histograms.cumsum(dim=1), (1, 0))
    moments = torch.nn.functional.pad((histograms * grid).cumsum(dim=1), (1, 0))
    for _ in range(MAX_STEPS):
        edges = _cell_edges(codebooks)
        count = counts.gather(1, edges).diff(dim=1)
        means = moments.gather(1, edges).diff(dim=1).double() / count
        improved = torch.where(count > 0, means, codebooks)
        moved = (improved - codebooks).abs().max()
        codebooks = improved
        if moved <= SETTLED:
            break
    return codebooks


def companded_entries(histograms: Tensor) -> Tensor:
    """Sixteen starting entries for each histogram, spaced by the cube root of its density.

    That is the asymptotically optimal spacing for squared error (Panter and Dite, 1951). An empty histogram gets even
    spacing over the grid.

    Args:
        histograms: int64 [N, NUM_BINS].

    Returns:
        fp64 [N, 16] in grid steps, each row sorted ascending.
    """
    density = histograms.double().pow(1 / 3)
    density = torch.where(density.sum(dim=1, keepdim=True) > 0, density, 1.0)
    mass = density.cumsum(dim=1)
    levels = (torch.arange(CODEBOOK_SIZE, dtype=torch.float64, device="cpu") + 0.5) / CODEBOOK_SIZE
    wanted = (levels * mass[:, -1:]).contiguous()
    return (torch.searchsorted(mass, wanted) - GRID_MAX).double()


def _midpoints(codebooks: Tensor) -> Tensor:
    return (codebooks[:, 1:] + codebooks[:, :-1]) / 2


def _cell_edges(codebooks: Tensor) -> Tensor:
    """int64 [N, 17]: the bins of entry j's cell are edges[j] up to edges[j + 1], a midpoint belonging to the lower."""
    inner = _midpoints(codebooks).floor().long() + (GRID_MAX + 1)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=NUM_BINS)
