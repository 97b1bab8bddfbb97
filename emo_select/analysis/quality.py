"""How good a clustering is: the published metrics, agreement of restarts, and what becomes of each cluster in them.

Shapes: R rows, k clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int32]
Floats = NDArray[np.float32]
SILHOUETTE_ROWS = 10_000
SEED = 42


def published_quality(values: Floats, assignments: Labels, sources: Sequence[str]) -> dict[str, float]:
    """The published metrics, by their names. Silhouettes are of at most 10,000 rows, drawn with seed 42.

    `avg_source_entropy` is in bits, a plain mean over the clusters that have rows. With a single cluster only the
    counts are there.
    """
    found, sizes = np.unique(assignments, return_counts=True)
    metrics: dict[str, float] = {"n_clusters": len(found), "n_samples": len(assignments)}
    if len(found) < 2:
        return metrics
    if len(found) < len(values):  # else every row is a cluster of its own, and these are not defined
        metrics |= _separation(values, assignments)
    metrics |= {"cluster_size_min": int(sizes.min()), "cluster_size_max": int(sizes.max()),
                "cluster_size_median": int(np.median(sizes)), "cluster_size_std": float(sizes.std()),
                "avg_source_entropy": _source_entropy(assignments, sources)}
    return metrics


def _separation(values: Floats, assignments: Labels) -> dict[str, float]:
    from sklearn import metrics

    count = min(SILHOUETTE_ROWS, len(values))
    rows = np.random.default_rng(SEED).choice(len(values), count, replace=False)
    few = values[rows]
    found: dict[str, float] = {}
    if 1 < len(np.unique(assignments[rows])) < count:
        found = {"silhouette": float(metrics.silhouette_score(few, assignments[rows], metric="euclidean")),
                 "silhouette_cosine": float(metrics.silhouette_score(few, assignments[rows], metric="cosine"))}
    return found | {"calinski_harabasz": float(metrics.calinski_harabasz_score(values, assignments)),
                    "davies_bouldin": float(metrics.davies_bouldin_score(values, assignments))}


def contingency(first: NDArray[np.integer], second: NDArray[np.integer]) -> NDArray[np.int64]:
    """How many rows have each pair of labels: (max first + 1, max second + 1)."""
    rows, columns = int(first.max(initial=-1)) + 1, int(second.max(initial=-1)) + 1
    pairs = first.astype(np.int64) * columns + second
    return np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)


def _source_entropy(assignments: Labels, sources: Sequence[str]) -> float:
    names, numbers = np.unique(np.asarray(sources), return_inverse=True)
    table = contingency(assignments, numbers)
    entropies = [entropy_bits(row) for row in table if row.sum()]
    return float(np.mean(entropies)) if len(names) else 0.0


def entropy_bits(counts: NDArray[np.integer] | NDArray[np.floating]) -> float:
    """Of a distribution given by counts or weights."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def adjusted_rand(first: Labels, second: Labels) -> float:
    """Adjusted Rand index of two clusterings of the same rows."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(first, second))


def survival(best: Labels, others: Sequence[Labels], k: int) -> tuple[float | None, ...]:
    """Of each cluster of `best`, the mean over `others` of its largest Jaccard index with a cluster there."""
    if not others:
        return (None,) * k
    found = np.zeros(k)
    for other in others:
        table = np.zeros((k, k))
        counted = contingency(best, other)
        table[:counted.shape[0], :counted.shape[1]] = counted
        union = table.sum(axis=1, keepdims=True) + table.sum(axis=0, keepdims=True) - table
        found += (table / np.maximum(union, 1)).max(axis=1)
    return tuple(float(value) for value in found / len(others))
