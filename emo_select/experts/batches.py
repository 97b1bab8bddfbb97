"""Packing of token sequences into batches of similar length.

Tokens of all segments lie in one packed order: batch after batch, segment after segment, without padding. Only
attention sees a padded (B, S) arrangement; causal attention with padding on the right needs no mask. Segments that
continue a shared prefix are laid out several to a row behind it, and a mask keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from emo_select.experts.prefixes import Segment

GroupRows = list[tuple[int, Tensor | None, int]]
ROW_TOKENS = 512  # behind a shared prefix; more would mostly be attention to tokens that the mask hides


@dataclass(frozen=True)
class Batch:
    """Segments that pass a layer together: rows `start` to `stop` of the packed order.

    `leads`: they are prefixes that other batches continue. `parent`: the prefix that these continue, of `context`
    tokens; it stands in front of each row. `rows`: the row of each segment; one row each if empty.
    """

    segments: tuple[int, ...]
    lengths: tuple[int, ...]
    start: int
    leads: bool = False
    parent: int | None = None
    context: int = 0
    rows: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        """One past the last packed row."""
        return self.start + sum(self.lengths)

    @cached_property
    def _starts(self) -> list[tuple[int, int]]:
        """(row, column) of each segment's first token."""
        filled: dict[int, int] = {}
        found = []
        for row, length in zip(self.rows or range(len(self.lengths)), self.lengths, strict=True):
            found.append((row, filled.setdefault(row, self.context)))
            filled[row] += length
        return found

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(B, S) of the padded arrangement."""
        ends = [column + length for (_, column), length in zip(self._starts, self.lengths, strict=True)]
        return self._starts[-1][0] + 1, max(ends)

    @cached_property
    def places(self) -> Tensor | None:
        """Position in the flattened (B·S) arrangement of each packed token; None where nothing else is there."""
        width = self.shape[1]
        if not self.rows and all(length == width for length in self.lengths):
            return None
        return torch.cat([torch.arange(row * width + column, row * width + column + length)
                          for (row, column), length in zip(self._starts, self.lengths, strict=True)])

    def pad(self, packed: Tensor, context: Tensor | None = None) -> Tensor:
        """(T, D), behind `context` (P, D) in each row → (B, S, D), zeros where there is no token."""
        if self.places is None:
            return packed.view(*self.shape, -1)
        padded = packed.new_zeros(self.shape[0] * self.shape[1], packed.shape[-1])
        padded.index_copy_(0, self.places.to(packed.device), packed)
        padded = padded.view(*self.shape, -1)
        if context is not None:
            padded[:, :self.context] = context
        return padded

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, S, D) → (T, D)."""
        rows = padded.reshape(-1, padded.shape[-1])
        return rows if self.places is None else rows.index_select(0, self.places.to(padded.device))

    def positions(self) -> Tensor:
        """(B, S): every token's position in its own text."""
        found = torch.arange(self.shape[1]).repeat(self.shape[0], 1)
        for (row, column), length in zip(self._starts, self.lengths, strict=True):
            found[row, column:column + length] = torch.arange(self.context, self.context + length)
        return found

    def mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(B, 1, S, S), to be added to attention scores: a token sees the context, its own segment, nothing later."""
        owner = torch.full(self.shape, -1)  # padding sees itself
        owner[:, :self.context] = 0
        for number, ((row, column), length) in enumerate(zip(self._starts, self.lengths, strict=True), start=1):
            owner[row, column:column + length] = number
        owner = owner.to(device)
        seen = (owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])
        hidden = ~seen.tril()
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(
            hidden, torch.finfo(dtype).min)[:, None]

    def group_rows(self, segments: Sequence[Segment]) -> GroupRows:
        """(group, rows of this batch's packed tokens that belong to it, how often they count); None: all rows."""
        members = [segments[number].weights for number in self.segments]
        if len(set(members)) == 1:
            return [(group, None, count) for group, count in members[0]]
        places = torch.arange(sum(self.lengths)).split(list(self.lengths))
        found: dict[tuple[int, int], list[Tensor]] = {}
        for weights, rows in zip(members, places, strict=True):
            for weight in weights:
                found.setdefault(weight, []).append(rows)
        return [(group, torch.cat(rows), count) for (group, count), rows in sorted(found.items(), key=lambda x: x[0])]


def pack(segments: Sequence[Segment], token_budget: int) -> list[Batch]:
    """Batches of at most `token_budget` padded tokens (at least one segment each), longest segments first.

    Prefixes come before all else. The order depends only on the lengths, so the same calibration set always gives the
    same batches, and the longest batch comes early: if memory does not suffice, it is soon known.
    """
    families: dict[tuple[bool, int | None], list[int]] = {}  # in the order of their first segments: prefixes first
    prefixes = {segment.parent for segment in segments}
    for number, segment in enumerate(segments):
        if len(segment.tokens):
            families.setdefault((number not in prefixes, segment.parent), []).append(number)
    batches: list[Batch] = []
    for (follows, parent), members in sorted(families.items(), key=lambda family: family[1][0]):
        members.sort(key=lambda number: (-len(segments[number].tokens), number))
        while members:
            count, rows = _fill(segments, members, parent, token_budget)
            taken, members = tuple(members[:count]), members[count:]
            batches.append(Batch(taken, tuple(len(segments[number].tokens) for number in taken),
                                 batches[-1].stop if batches else 0, not follows, parent,
                                 0 if parent is None else len(segments[parent].tokens), rows))
    return batches


def _fill(segments: Sequence[Segment], members: Sequence[int], parent: int | None, budget: int
          ) -> tuple[int, tuple[int, ...]]:
    """How many of `members` the next batch takes, and their rows where several share one."""
    longest = len(segments[members[0]].tokens)
    if parent is None:
        return max(1, budget // longest), ()
    context = len(segments[parent].tokens)
    width = max(longest, min(budget, max(ROW_TOKENS, context)))
    rows: list[int] = []
    row, used = 0, 0
    for number in members:
        length = len(segments[number].tokens)
        if used + length > width:
            row, used = row + 1, 0
            if (row + 1) * (context + width) > budget:
                break
        used += length
        rows.append(row)
    return len(rows), tuple(rows)
