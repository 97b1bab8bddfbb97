"""The published split rules: which rows, in which order, are trained on, calibrated with and tested.

Every shuffle is the same: the permutation that NumPy's default generator draws with seed 0 (equal to
`datasets.Dataset.shuffle(seed=0)`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from emo_select.tasks.base import Row, Sources, SplitRule

T = TypeVar("T")
HELD_OUT = 1000  # rows that the published splits move from the front of the shuffled train split to its end


def shuffled(rows: Sequence[T]) -> list[T]:
    """`rows` in the order of a permutation with seed 0."""
    return [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]


def rotated(rows: Sequence[T]) -> list[T]:
    """Shuffled, with the first 1000 moved to the end."""
    order = shuffled(rows)
    return order[HELD_OUT:] + order[:HELD_OUT]


def stored(split: str) -> Callable[[Sources], Sequence[Row]]:
    """A split of the data set as it is stored."""
    return lambda sources: [row for source in sources for row in source.rows(split)]


def _train_and_validation(sources: Sources) -> list[Row]:
    return shuffled([row for split in ("train", "validation") for row in sources[0].rows(split)])


AS_STORED = SplitRule(train=stored("train"), validation=stored("validation"), test=stored("test"))
POOLED = SplitRule(train=_train_and_validation, test=stored("test"))
ROTATED = SplitRule(train=lambda sources: rotated(sources[0].rows("train")), test=stored("validation"))


def rotated_and_shuffled(test: str) -> SplitRule:
    """Rotated and shuffled once more; `test` is the stored split that is tested."""
    return SplitRule(train=lambda sources: shuffled(rotated(sources[0].rows("train"))), test=stored(test))


def _cut(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The first 60 % (rounded down) and the rest."""
    cut = int(0.6 * len(rows))
    return list(rows[:cut]), list(rows[cut:])


def _mmlu_train(sources: Sources) -> list[Row]:
    front = [row for source in sources for row in _cut(shuffled(source.rows("test")))[0]]
    return shuffled(front + [row for source in sources for row in source.rows("validation")])


def _mmlu_test(sources: Sources) -> list[Row]:
    return [row for source in sources for row in _cut(shuffled(source.rows("test")))[1]]


MMLU = SplitRule(train=_mmlu_train, test=_mmlu_test)


def mmlu_pro(category: str) -> SplitRule:
    """The rows of one category: the first 100 shuffled rows and the last 40 % of the others train, the rest tests."""

    def parts(sources: Sources) -> tuple[list[Row], list[Row]]:
        rows = shuffled([row for row in sources[0].rows("test") if row["category"] == category])
        tested, kept = _cut(rows[100:])
        return rows[:100] + kept, tested

    return SplitRule(train=lambda sources: parts(sources)[0], test=lambda sources: parts(sources)[1])
