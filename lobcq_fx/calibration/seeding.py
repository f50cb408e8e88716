"""Starting codebooks for the fit: k-means++ over blocks as in the paper, or random for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.calibration.lloyd_max import NUM_BINS, companded_entries
from lobcq_fx.format.spec import BLOCK_SIZE, CODEBOOK_SIZE, ENTRY_MAX, GRID, GRID_MAX


def kmeans_plus_plus(blocks: Tensor, num_codebooks: int, generator: torch.Generator) -> Tensor:
    """Cluster blocks around k-means++ centres and start one codebook from each cluster's scalars.

    The first centre is a random block; each further one is drawn with probability proportional to its squared
    distance to the nearest centre so far (Arthur and Vassilvitskii, 2007). A codebook does not care in which order a
    block's scalars come, so distances are taken between sorted blocks.

    Args:
        blocks: int [n, 8] on the grid, n > 0.
        num_codebooks: N_c.
        generator: CPU generator.

    Returns:
        fp64 [N_c, 16] in grid steps, each row sorted ascending.
    """
    points = blocks.double().sort(dim=1).values
    nearest = _one_of(points.shape[0], generator)
    distance = torch.full((points.shape[0],), torch.inf, dtype=torch.float64, device="cpu")
    cluster = torch.zeros(points.shape[0], dtype=torch.long, device="cpu")
    for k in range(num_codebooks):
        if k > 0:
            nearest = _draw(distance, generator)
        to_centre = (points - points[nearest]).square().sum(dim=1)
        cluster = torch.where(to_centre < distance, k, cluster)
        distance = torch.minimum(distance, to_centre)
    return companded_entries(cluster_histograms(blocks, cluster, num_codebooks))


def random_codebooks(num_codebooks: int, generator: torch.Generator) -> Tensor:
    """Codebooks of entries drawn uniformly from [-31, 31]: fp64 [N_c, 16] in grid steps, each row sorted ascending."""
    shape = (num_codebooks, CODEBOOK_SIZE)
    entries = torch.rand(shape, dtype=torch.float64, device="cpu", generator=generator)
    return ((2 * entries - 1) * ENTRY_MAX * GRID).sort(dim=1).values


def cluster_histograms(blocks: Tensor, cluster: Tensor, num_codebooks: int) -> Tensor:
    """Count each cluster's scalars: blocks int [n, 8] on the grid, cluster int64 [n] -> int64 [N_c, NUM_BINS]."""
    index = (cluster * NUM_BINS + GRID_MAX).view(-1, 1).expand(-1, BLOCK_SIZE) + blocks
    return torch.bincount(index.flatten(), minlength=num_codebooks * NUM_BINS).view(num_codebooks, NUM_BINS)


def _one_of(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (1,), dtype=torch.long, device="cpu", generator=generator)


def _draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One index with probability proportional to `weights`; any index where all are 0 (every block is a centre)."""
    if float(weights.sum()) == 0.0:
        return _one_of(weights.shape[0], generator)
    mass = weights.cumsum(dim=0)
    drawn = torch.rand(1, dtype=torch.float64, device="cpu", generator=generator) * mass[-1]
    return torch.searchsorted(mass, drawn, right=True).clamp(max=weights.shape[0] - 1)
