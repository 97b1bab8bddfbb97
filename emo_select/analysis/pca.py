"""Principal components from the covariance, which is summed up over blocks of rows.

The decomposition is exact, and memory depends on the number of columns alone: D² numbers in fp64.

Shapes: R rows, D columns, n components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from emo_select.errors import SpecError

VARIANCE = 0.95  # share that the kept components hold, as published
Floats = NDArray[np.float32]
Blocks = Callable[[], Iterable[tuple[int, Floats]]]


@dataclass(frozen=True)
class Pca:
    """`mean` (D,), `components` (n, D) by falling variance, and `cumulative` (min(R, D),) shares of the variance."""

    mean: NDArray[np.float64]
    components: Floats
    cumulative: NDArray[np.float64]

    @property
    def variance(self) -> float:
        """Share of the variance that the kept components hold."""
        return float(self.cumulative[len(self.components) - 1])

    def apply(self, values: Floats) -> Floats:
        """(R, D) → (R, n)."""
        centred = torch.from_numpy(values - self.mean.astype(np.float32))
        projected: Floats = (centred @ torch.from_numpy(self.components).T).numpy()
        return projected


def fit_pca(blocks: Blocks, rows: int, columns: int, variance: float = VARIANCE) -> Pca:
    """As many components as hold `variance` of all of it: the first place where the cumulative share reaches it.

    `blocks()` gives (first row, rows in fp32) of all rows; it is called once. SpecError where nothing varies.
    """
    mean, covariance = _covariance(blocks, rows, columns)
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
    values, vectors = values.flip(0).clamp(min=0).numpy(), vectors.flip(1).numpy()
    total = values.sum()
    if rows < 2 or not total > 0:
        raise SpecError("All rows are alike, so there is nothing to cluster; give more texts.")
    cumulative = (np.cumsum(values) / total)[:min(rows, columns)]
    count = min(int(np.searchsorted(cumulative, variance)) + 1, len(cumulative))
    return Pca(mean, np.ascontiguousarray(vectors[:, :count].T, dtype=np.float32), cumulative)


def _covariance(blocks: Blocks, rows: int, columns: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance (not divided by the number of rows).

    Products are taken in fp32 of differences from the first block's mean, so that they lose no digits to a common
    offset, and summed in fp64.
    """
    total, products = np.zeros(columns), torch.zeros(columns, columns, dtype=torch.float64)
    shift: Floats | None = None
    for _, values in blocks():
        shift = values.mean(axis=0) if shift is None else shift
        moved = torch.from_numpy(values - shift)
        total += moved.sum(dim=0, dtype=torch.float64).numpy()
        products += (moved.T @ moved).double()
    offset = total / max(rows, 1)
    covariance = products.numpy() - rows * np.outer(offset, offset)
    return offset + (shift if shift is not None else 0), covariance
