"""Which tokens to run once: inputs that share a prefix become a trie, cut into packs that are rows of a forward.

Legend: S inputs in lexicographic order, N tokens of a pack, P tokens of the cached prefix.

In that order the tokens that an input adds to the trie are those after its longest common prefix (LCP) with the
input before it, so trie sizes are differences of a cumulative sum. A prefix that several packs would need is run once
and cached (a *block*); everything below it is run token by distinct token inside packs. Packs are small, because the
attention of each of their tokens computes on all of the others, seen or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

BLOCK_COST = 128  # what one more forward costs besides its tokens, in tokens


@dataclass(frozen=True)
class ScoredInput:
    """The model input of one request (context + continuation without its last token) and where it is scored.

    `first_scored` is the position whose prediction is the first token of the continuation.
    """

    tokens: Ids
    first_scored: int


@dataclass
class Block:
    """A prefix of `length` tokens to run once, and the packs of inputs (indices) that continue it."""

    prefix: Ids
    spans: list[tuple[int, int]] = field(default_factory=list)
    packs: list[list[int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prefix)


@dataclass(frozen=True)
class Pack:
    """One forward behind a cached prefix: N distinct tokens of a trie as one sequence.

    `allowed[i, j]` says that token i may attend to token j (its ancestors and itself; the prefix is always visible).
    `scored[s]` are the indices in the pack that predict the continuation of the s-th input, in order.
    """

    tokens: Ids
    positions: Ids
    allowed: NDArray[np.bool_]
    scored: list[Ids]


class Planner:
    """Plans the blocks and packs of a list of inputs, for packs of about `budget` new tokens, at most twice as many
    where that keeps inputs together and a single input does not have more."""

    def __init__(self, inputs: Sequence[ScoredInput], budget: int) -> None:
        keys = [row.tokens.astype(">u4").tobytes() for row in inputs]  # big-endian bytes sort as the numbers do
        self.order = sorted(range(len(inputs)), key=keys.__getitem__)
        self.rows = [inputs[index] for index in self.order]
        self.budget = budget
        self.lengths = np.array([len(row.tokens) for row in self.rows])
        self.free = np.array([row.first_scored for row in self.rows])
        self.lcp = np.array([0] + [common_prefix(a.tokens, b.tokens) for a, b in pairwise(self.rows)])
        self._added = np.cumsum(self.lengths - self.lcp)

    @property
    def distinct_tokens(self) -> int:
        """Tokens of the whole trie: the least that any plan has to run."""
        return int(self._added[-1])

    def plan(self) -> list[Block]:
        """Blocks in lexicographic order; packs hold indices into the inputs as given."""
        blocks = self._blocks()
        for block in blocks:
            rows = np.concatenate([np.arange(*span) for span in block.spans])
            block.packs = [[self.order[row] for row in pack] for pack in self._packs(rows, block.length)]
        return blocks

    def _size(self, first: int, end: int, base: int) -> int:
        """Distinct tokens of the rows in [first, end) behind a shared prefix of `base` tokens."""
        return int(self.lengths[first] - base + self._added[end - 1] - self._added[first])

    def _blocks(self) -> list[Block]:
        root = Block(prefix=np.empty(0, np.int64))
        found, todo = [root], [(0, len(self.rows), root)]
        while todo:
            first, end, block = todo.pop()
            if end - first == 1 or self._size(first, end, block.length) <= self.budget:
                block.spans.append((first, end))
                continue
            inner = self.lcp[first + 1 : end]
            shared = int(min(inner.min(), self.free[first:end].min()))
            repeats = self._size(first, end, block.length) // self.budget  # packs that would run the prefix again
            if repeats * (shared - block.length) > shared + BLOCK_COST:
                block = Block(prefix=self.rows[first].tokens[:shared])
                found.append(block)
            cuts = [first, *(first + 1 + np.flatnonzero(inner == inner.min())), end]
            todo.extend((int(a), int(b), block) for a, b in zip(cuts[-2::-1], cuts[:0:-1], strict=True))
        return [block for block in found if block.spans]

    def _packs(self, rows: Ids, base: int) -> list[list[int]]:
        """Cut rows (ascending) into packs, preferring a cut where little of the trie is run twice."""
        joins = np.array([self._join(a, b) for a, b in pairwise(rows)], dtype=np.int64)
        joins = np.maximum(np.concatenate([[base], joins]), base)
        lengths = self.lengths[rows]
        added = np.cumsum(lengths - joins)
        packs, start = [], 0
        while start < len(rows):
            end = start + self._cut(joins[start:], added[start:] - added[start] + lengths[start] - base)
            packs.append([int(row) for row in rows[start:end]])
            start = end
        return packs

    def _cut(self, joins: Ids, sizes: Ids) -> int:
        """How many rows the next pack takes; a pack of the first n rows has `sizes[n - 1]` tokens.

        Between half and twice the budget it ends where the least is shared with the next row.
        """
        if sizes[-1] <= self.budget:
            return len(sizes)
        early, late = (max(1, int(np.searchsorted(sizes, size, side="right")))
                       for size in (self.budget // 2, 2 * self.budget))
        return early + int(np.argmin(joins[early : late + 1])) if early < late else late

    def _join(self, a: int, b: int) -> int:
        """Longest common prefix of two rows of the sorted list, a < b."""
        return int(self.lcp[a + 1 : b + 1].min())


def common_prefix(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


def build_pack(inputs: Sequence[ScoredInput], base: int) -> Pack:
    """Lay the trie of `inputs` (lexicographic order) out as one sequence behind a prefix of `base` tokens."""
    shared = [base, *(max(base, common_prefix(a.tokens, b.tokens)) for a, b in pairwise(inputs))]
    size = sum(len(row.tokens) - join for row, join in zip(inputs, shared, strict=True))
    tokens, positions = np.empty(size, np.int64), np.empty(size, np.int64)
    allowed = np.zeros((size, size), bool)
    path = np.empty(max(len(row.tokens) for row in inputs) - base, np.int64)  # pack index of each depth of this branch
    scored, used = [], 0
    for row, join in zip(inputs, shared, strict=True):
        length = len(row.tokens)
        new = slice(used, used + length - join)
        tokens[new], positions[new] = row.tokens[join:], np.arange(join, length)
        allowed[new, path[: join - base]] = True
        allowed[new, new] = np.tri(length - join, dtype=bool)
        path[join - base : length - base] = np.arange(new.start, new.stop)
        scored.append(path[row.first_scored - base : length - base].copy())
        used = new.stop
    return Pack(tokens, positions, allowed, scored)
