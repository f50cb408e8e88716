"""The codebook fit spelt out in plain numpy: every block against every entry, no tables, no histograms."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def nearest_errors(values: Floats, codebooks: Floats) -> tuple[NDArray[np.int64], Floats]:
    """values [n], codebooks [N, 16] -> nearest entry's index and its squared error, [N, n] each."""
    squared = (values[None, :, None] - codebooks[:, None, :]) ** 2
    return squared.argmin(axis=2), squared.min(axis=2)


def assign(blocks: Floats, codebooks: Floats) -> tuple[NDArray[np.int64], float]:
    """blocks [n, 8] -> the cluster of each block, and the sum of squared errors."""
    _, errors = nearest_errors(blocks.reshape(-1), codebooks)
    per_block = errors.reshape(len(codebooks), len(blocks), -1).sum(axis=2)
    return per_block.argmin(axis=0), float(per_block.min(axis=0).sum())


def lloyd_max(values: Floats, codebook: Floats, steps: int = 100, settled: float = 1e-3) -> Floats:
    """One codebook [16] improved for values [n]; an entry with no values stays."""
    for _ in range(steps):
        index, _ = nearest_errors(values, codebook[None])
        cells = [values[index[0] == j] for j in range(len(codebook))]
        improved = np.array([cell.mean() if len(cell) else old for cell, old in zip(cells, codebook, strict=True)])
        moved = np.abs(improved - codebook).max()
        codebook = improved
        if moved <= settled:
            break
    return codebook


def fit(blocks: Floats, codebooks: Floats, iterations: int) -> tuple[Floats, list[float]]:
    """Alternate `iterations` times: final codebooks [N, 16] and the error before each update and at the end."""
    history = []
    for _ in range(iterations):
        cluster, error = assign(blocks, codebooks)
        history.append(error)
        codebooks = np.stack(
            [lloyd_max(blocks[cluster == k].reshape(-1), codebook) for k, codebook in enumerate(codebooks)]
        )
    history.append(assign(blocks, codebooks)[1])
    return codebooks, history


def optimal_codebook(values: Floats, clusters: int) -> tuple[Floats, float]:
    """The best 1-D k-means there is and its squared error, by dynamic programming over the sorted values."""
    ordered = np.sort(values)
    n = len(ordered)
    first = np.concatenate([[0.0], ordered.cumsum()])
    second = np.concatenate([[0.0], (ordered**2).cumsum()])

    def cost(i: int, j: int) -> float:
        return float(second[j] - second[i] - (first[j] - first[i]) ** 2 / (j - i))

    best = np.full((clusters + 1, n + 1), np.inf)
    cut = np.zeros((clusters + 1, n + 1), dtype=int)
    best[0, 0] = 0.0
    for k in range(1, clusters + 1):
        for j in range(k, n + 1):
            costs = [best[k - 1, i] + cost(i, j) for i in range(k - 1, j)]
            cut[k, j] = k - 1 + int(np.argmin(costs))
            best[k, j] = min(costs)
    entries, end = [], n
    for k in range(clusters, 0, -1):
        start = cut[k, end]
        entries.append((first[end] - first[start]) / (end - start))
        end = start
    return np.array(entries[::-1]), float(best[clusters, n])
