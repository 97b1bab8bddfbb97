"""Intervals and nulls: documents drawn again, and clusters or labels shuffled.

An interval is the middle 95 % of what a number is on documents drawn with replacement. A null is the same number where
what it is about has been shuffled away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emo_select.analysis.layout import Measure

SEED = 42
DRAWS = 1000
DRAW_CELLS = 4_000_000  # numbers drawn at a time
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Named:
    """What a measure is called and is about."""

    name: str
    about: str
    layer: int | None = None


def mean_measure(named: Named, per_document: Floats, null: Sequence[float] | float | None = None) -> Measure:
    """The mean of a number per document, NaN left out."""
    values = per_document[np.isfinite(per_document)]
    if not len(values):
        return measure(named, float("nan"), (), null)
    return measure(named, float(values.mean()), _drawn_means(values), null)


def measure(named: Named, value: float, drawn: Sequence[float] | Floats,
            null: Sequence[float] | float | None = None) -> Measure:
    """A measure from its value, its values on drawn documents, and on shuffled data (one number: known exactly)."""
    low, high = spread(drawn)
    if null is None or isinstance(null, float):
        middle, null_low, null_high = null, None, None
    else:
        middle = float(np.mean(null)) if len(null) else None
        null_low, null_high = spread(null)
    return Measure(name=named.name, about=named.about, layer=named.layer, value=value, low=low, high=high, null=middle,
                   null_low=null_low, null_high=null_high)


def spread(values: Sequence[float] | Floats) -> tuple[float | None, float | None]:
    """The 2.5 and 97.5 percentiles; None of fewer than two values."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if len(finite) < 2:
        return None, None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def _drawn_means(values: Floats) -> Floats:
    if len(values) < 2:
        return np.empty(0)
    generator, step = np.random.default_rng(SEED), max(1, DRAW_CELLS // len(values))
    found = [values[generator.integers(0, len(values), (min(step, DRAWS - done), len(values)))].mean(axis=1)
             for done in range(0, DRAWS, step)]
    return np.concatenate(found)


def document_weights(documents: int, draws: int) -> Iterator[NDArray[np.int64]]:
    """(N,) how often each document comes in a draw of N, for each of `draws` draws; none for a single document."""
    generator = np.random.default_rng(SEED)
    for _ in range(draws if documents > 1 else 0):
        yield np.bincount(generator.integers(0, documents, documents), minlength=documents)


def shuffles(values: NDArray[np.integer], times: int) -> Iterator[NDArray[np.integer]]:
    """`values` in another order, so many times."""
    generator = np.random.default_rng(SEED)
    for _ in range(times):
        yield generator.permutation(values)


def with_draws(named: Named, statistic: Callable[[NDArray[np.int64]], float], documents: int, draws: int,
               null: Sequence[float] | float | None = None) -> Measure:
    """A measure whose `statistic` takes how often each document counts."""
    value = statistic(np.ones(documents, dtype=np.int64))
    return measure(named, value, [statistic(weights) for weights in document_weights(documents, draws)], null)


def over_layers(named: Named, layers: Sequence[Measure]) -> list[Measure]:
    """The mean over layers, then each layer. The bounds of the mean are the means of the layers' bounds."""
    if not layers:
        return []
    mean = Measure(name=named.name, about=named.about, value=float(np.mean([one.value for one in layers])),
                   low=_mean([one.low for one in layers]), high=_mean([one.high for one in layers]),
                   null=_mean([one.null for one in layers]), null_low=_mean([one.null_low for one in layers]),
                   null_high=_mean([one.null_high for one in layers]))
    return [mean, *layers]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
