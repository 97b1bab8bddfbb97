"""Spherical (and plain) k-means with restarts, in blocks of rows.

Each restart seeds by k-means++ and runs Lloyd's iterations to the end; empty clusters are seeded again with the rows
that fit their cluster worst. With faiss installed (extra `analysis`) it can run the iterations instead. What is kept is
the restart with the best objective: the mean cosine of a row with its cluster's centre, or for plain k-means the
smallest mean squared distance.

Shapes: R rows, n columns, k clusters.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emo_select import progress
from emo_select.errors import SpecError

Floats = NDArray[np.float32]
Engine = Literal["torch", "faiss"]
ITERATIONS = 100
TOLERANCE = 1e-5  # relative gain of the objective below which the iterations end
BLOCK_ROWS = 16384
FEW_ROWS, MORE_STARTS = 8000, 4
MOST_MOVES, LEAST_GAIN = 300, 1e-9
SEED_ROWS = 256  # k-means++ draws from this many rows per cluster


@dataclass(frozen=True)
class Clustering:
    """Assignments (R,), centres (k, n) and the objective of the best restart, and the assignments of all."""

    assignments: NDArray[np.int32]
    centres: Floats
    objective: float
    objectives: tuple[float, ...]
    runs: tuple[NDArray[np.int32], ...]


def starts(rows: int, restarts: int) -> int:
    """How many starts `restarts` stands for: of few rows up to four times as many, which cost next to nothing."""
    return restarts * max(1, min(MORE_STARTS, FEW_ROWS // rows)) if restarts > 1 else 1


def has_faiss() -> bool:
    """Whether faiss is installed."""
    return importlib.util.find_spec("faiss") is not None


def kmeans(values: Floats, k: int, *, spherical: bool = True, restarts: int = 8, seed: int = 42,
           engine: Engine = "torch", bar: progress.Bar | None = None) -> Clustering:
    """Cluster the rows of `values` (R, n), for spherical k-means of length 1.

    Raises:
        SpecError: fewer rows than clusters, or faiss asked for and not installed.
    """
    if k < 1 or k > len(values):
        raise SpecError(f"{k} clusters need at least {k} rows, but there are {len(values)}; ask for fewer with --k.")
    if engine == "faiss" and not has_faiss():
        raise SpecError("faiss is not installed; get it with `pip install 'emo-select[analysis]'`, or leave out "
                        "--engine faiss.")
    runs, count = [], starts(len(values), restarts)
    for restart in range(count):
        runs.append(_one(values, k, spherical, seed + restart, engine))
        if bar is not None:
            bar.advance(restarts / count)
    best = max(runs, key=lambda run: run[2])
    return Clustering(best[0], best[1], best[2], tuple(run[2] for run in runs), tuple(run[0] for run in runs))


def _one(values: Floats, k: int, spherical: bool, seed: int, engine: Engine
         ) -> tuple[NDArray[np.int32], Floats, float]:
    generator = torch.Generator().manual_seed(seed)
    start = _faiss_centres(values, k, spherical, seed) if engine == "faiss" \
        else _plus_plus(torch.from_numpy(_seed_rows(values, k, generator)), k, generator)
    found = _lloyd(values, start, spherical)
    return _moved(values, found[0], k) if spherical and len(values) <= FEW_ROWS else found


def _seed_rows(values: Floats, k: int, generator: torch.Generator) -> Floats:
    """The rows that k-means++ looks at: all, or a draw where there are very many."""
    if len(values) <= SEED_ROWS * k:
        return values
    rows = torch.randperm(len(values), generator=generator)[:SEED_ROWS * k].numpy()
    few: Floats = values[np.sort(rows)]
    return few


def _plus_plus(values: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k rows, each the best of a few draws in proportion to the squared distance from those chosen before."""
    tries = 2 + int(np.log(k))
    norms = values.square().sum(dim=1)
    first = int(torch.randint(len(values), (1,), generator=generator))
    chosen = [first]
    nearest = _distances(values, norms, values[first:first + 1])[:, 0]
    while len(chosen) < k:
        if not float(nearest.sum()) > 0:  # fewer distinct rows than clusters
            chosen += torch.randint(len(values), (k - len(chosen),), generator=generator).tolist()
            break
        drawn = torch.multinomial(nearest.clamp(min=0), tries, replacement=True, generator=generator)
        candidates = torch.minimum(nearest[:, None], _distances(values, norms, values[drawn]))
        best = int(candidates.sum(dim=0, dtype=torch.float64).argmin())
        nearest = candidates[:, best]
        chosen.append(int(drawn[best]))
    return values[chosen].clone()


def _distances(values: Tensor, norms: Tensor, points: Tensor) -> Tensor:
    """Squared distances (R, P)."""
    found = norms[:, None] - 2 * values @ points.T + points.square().sum(dim=1)
    return found.clamp_(min=0)


def _lloyd(values: Floats, centres: Tensor, spherical: bool) -> tuple[NDArray[np.int32], Floats, float]:
    """Iterations until the objective or the assignments no longer change."""
    before, assigned = -np.inf, np.empty(0, dtype=np.int32)
    centres = _unit(centres) if spherical else centres
    for _ in range(ITERATIONS):
        found, fit, sums, counts = _assign(values, centres, spherical)
        if np.array_equal(found, assigned):
            break
        assigned, objective = found, float(fit.mean(dtype=np.float64))
        centres = _centres(values, sums, counts, fit, spherical)
        if objective - before <= TOLERANCE * abs(objective) and bool((counts > 0).all()):
            break
        before = objective
    found, fit, sums, counts = _assign(values, centres, spherical)
    final = _centres(values, sums, counts, fit, spherical)
    return found, final.numpy(), _objective(values, found, final, spherical)


def _moved(values: Floats, assigned: NDArray[np.int32], k: int) -> tuple[NDArray[np.int32], Floats, float]:
    """Move single rows to other clusters as long as that gains anything (Hartigan): iterations end in places that are
    best only as long as all rows move at once, and of few rows there are many such places.

    The sum of cosines with the centres is the sum of the lengths of the clusters' sums.
    """
    rows = torch.from_numpy(np.asarray(values)).double()
    own, squares = torch.from_numpy(assigned.astype(np.int64)), rows.square().sum(dim=1)
    sums = torch.zeros(k, rows.shape[1], dtype=torch.float64).index_add_(0, own, rows)
    dots, counts = rows @ sums.T, torch.bincount(own, minlength=k)
    for _ in range(MOST_MOVES):
        row, target, gain = _best_move(sums, dots, squares, own, counts)
        if gain <= LEAST_GAIN:
            break
        source = int(own[row])
        sums[source] -= rows[row]
        sums[target] += rows[row]
        dots[:, [source, target]] = rows @ sums[[source, target]].T
        counts[source], counts[target], own[row] = counts[source] - 1, counts[target] + 1, target
    found = own.numpy().astype(np.int32)
    return found, _unit(sums).float().numpy(), float(sums.norm(dim=1).sum() / len(rows))


def _best_move(sums: Tensor, dots: Tensor, squares: Tensor, own: Tensor, counts: Tensor) -> tuple[int, int, float]:
    """(row, cluster, gain) of the single move that gains most. No cluster loses its last row."""
    lengths, place = sums.norm(dim=1), torch.arange(len(own))
    leave = (lengths[own].square() - 2 * dots[place, own] + squares).clamp(min=0).sqrt() - lengths[own]
    leave[counts[own] <= 1] = -torch.inf
    join = (lengths.square() + 2 * dots + squares[:, None]).clamp(min=0).sqrt() - lengths
    join[place, own] = -torch.inf
    best, target = join.max(dim=1)
    row = int((best + leave).argmax())
    return row, int(target[row]), float(best[row] + leave[row])


def _assign(values: Floats, centres: Tensor, spherical: bool
            ) -> tuple[NDArray[np.int32], Floats, Tensor, NDArray[np.int64]]:
    """Nearest centre of every row and how well it fits (higher is better), sums and numbers of each cluster's rows."""
    k = len(centres)
    assigned, fit = np.empty(len(values), dtype=np.int32), np.empty(len(values), dtype=np.float32)
    sums = torch.zeros(centres.shape, dtype=torch.float64)
    penalty = torch.zeros(k) if spherical else centres.square().sum(dim=1)
    for start in range(0, len(values), BLOCK_ROWS):
        block = torch.from_numpy(np.asarray(values[start:start + BLOCK_ROWS]))
        scores = block @ centres.T if spherical else 2 * block @ centres.T - penalty
        best, index = scores.max(dim=1)
        if not spherical:
            best -= block.square().sum(dim=1)
        assigned[start:start + len(block)], fit[start:start + len(block)] = index.numpy(), best.numpy()
        sums += torch.from_numpy(group_sums(block.numpy(), index.numpy(), k))
    return assigned, fit, sums, np.bincount(assigned, minlength=k)


def group_sums(block: NDArray[np.floating], groups: NDArray[np.integer], count: int) -> NDArray[np.floating]:
    """Sums (count, n) of the rows (B, n) of each group, in the precision of `block`."""
    from scipy.sparse import csc_matrix  # several times as fast as index_add_ where rows are short

    chosen = csc_matrix((np.ones(len(block), dtype=block.dtype), groups, np.arange(len(block) + 1)),
                        shape=(count, len(block)))
    return np.asarray(chosen @ block)


def _centres(values: Floats, sums: Tensor, counts: NDArray[np.int64], fit: Floats, spherical: bool) -> Tensor:
    """Means of the clusters' rows; an empty cluster starts again at a row that fits its own worst."""
    means = (sums / torch.from_numpy(np.maximum(counts, 1))[:, None]).float()
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        worst = np.argsort(fit, kind="stable")[:len(empty)]
        means[empty] = torch.from_numpy(np.asarray(values[np.sort(worst)]))
    return _unit(means) if spherical else means


def _unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values, dim=1)


def _objective(values: Floats, assigned: NDArray[np.int32], centres: Tensor, spherical: bool) -> float:
    """Mean cosine with the centre, or minus the mean squared distance."""
    total = 0.0
    for start in range(0, len(values), BLOCK_ROWS):
        block = torch.from_numpy(np.asarray(values[start:start + BLOCK_ROWS]))
        own = centres[torch.from_numpy(assigned[start:start + BLOCK_ROWS]).long()]
        each = (block * own).sum(dim=1) if spherical else -(block - own).square().sum(dim=1)
        total += float(each.sum(dtype=torch.float64))
    return total / len(values)


def _faiss_centres(values: Floats, k: int, spherical: bool, seed: int) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    run: Any = faiss.Kmeans(values.shape[1], k, niter=25, spherical=spherical, seed=seed, min_points_per_centroid=1,
                            max_points_per_centroid=10_000_000)
    run.train(np.ascontiguousarray(values, dtype=np.float32))
    return torch.from_numpy(np.array(run.centroids))


def mean_cosine(values: Floats, assigned: NDArray[np.int32]) -> float:
    """Mean cosine of every row with its cluster's centre, whatever method made the clusters."""
    unit: Floats = (values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    k = int(assigned.max()) + 1
    sums = np.zeros((k, values.shape[1]))
    np.add.at(sums, assigned, unit)
    lengths = np.linalg.norm(sums, axis=1)
    return float(lengths.sum() / len(values))
