"""Prefixes that many calibration texts share, such as few-shot examples: run once, counted as often as they occur.

With causal attention the tokens of a common prefix have the same hidden states in every text. Texts are cut into a
prefix and what continues it; statistics of the prefix's tokens are multiplied by the number of texts that have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

LEAST_SAVED = 1024  # tokens; a prefix that saves less is not worth batches of its own


@dataclass(frozen=True)
class Segment:
    """Tokens that are run once. `weights`: (group, number of its texts that contain them). `parent`: the segment that
    they continue, if any."""

    tokens: Ids
    weights: tuple[tuple[int, int], ...]
    parent: int | None = None


def whole(texts: Sequence[Sequence[int]], groups: Sequence[int]) -> list[Segment]:
    """Every text a segment."""
    return [Segment(np.asarray(ids, dtype=np.int64), ((group, 1),)) for ids, group in zip(texts, groups, strict=True)]


def split(texts: Sequence[Sequence[int]], groups: Sequence[int]) -> list[Segment]:
    """Shared prefixes first, then what continues them and the texts that share nothing, in the order of the texts."""
    rows = [np.asarray(ids, dtype=np.int64) for ids in texts]
    keys = [row.astype(">u4").tobytes() for row in rows]  # big-endian bytes sort as the numbers do
    order = sorted(range(len(rows)), key=keys.__getitem__)
    prefixes: list[Segment] = []
    parent_of: dict[int, int] = {}
    for members, length in _shared([rows[i] for i in order]):
        texts_of = [order[place] for place in members]
        parent_of |= dict.fromkeys(texts_of, len(prefixes))
        counts = Counter(groups[i] for i in texts_of)
        prefixes.append(Segment(rows[texts_of[0]][:length], tuple(sorted(counts.items()))))
    rest = []
    for i, row in enumerate(rows):
        parent = parent_of.get(i)
        start = 0 if parent is None else len(prefixes[parent].tokens)
        rest.append(Segment(row[start:], ((groups[i], 1),), parent))
    return [*prefixes, *rest]


def _shared(rows: Sequence[Ids]) -> list[tuple[range, int]]:
    """Runs of `rows` (sorted) and the length of the prefix that each run shares, where that saves most.

    From the whole list downwards, a run is split where its neighbours share least as long as the parts save more.
    """
    common = np.array([_common(a, b) for a, b in pairwise(rows)], dtype=np.int64)
    size = np.cumsum([0, *(len(row) for row in rows)])
    found, todo = [], [(0, len(rows))] if rows else []
    while todo:
        first, end = todo.pop()
        if end - first < 2:
            continue
        inner = common[first:end - 1]
        cuts = [first, *(first + 1 + np.flatnonzero(inner == inner.min())), end]
        parts = [(int(a), int(b)) for a, b in pairwise(cuts)]
        saved = (end - first - 1) * int(inner.min())
        if saved < sum(_saved(common, *part) for part in parts):
            todo += reversed(parts)
        # at least half of the tokens: attention among a row of continuations costs more than among padded texts
        elif saved >= LEAST_SAVED and 2 * saved >= size[end] - size[first]:
            found.append((range(first, end), int(inner.min())))
    return found


def _saved(common: Ids, first: int, end: int) -> int:
    return (end - first - 1) * int(common[first:end - 1].min()) if end - first > 1 else 0


def _common(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length
