"""Packing of token sequences into batches of similar length.

Tokens of all examples lie in one packed order: batch after batch, example after example, without padding. Only
attention sees a padded (B, S) arrangement; causal attention with padding on the right needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Examples that pass a layer together: rows `start` to `stop` of the packed order."""

    examples: tuple[int, ...]
    lengths: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """One past the last packed row."""
        return self.start + sum(self.lengths)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S) of the padded arrangement."""
        return len(self.lengths), max(self.lengths)

    @cached_property
    def places(self) -> Tensor | None:
        """Position in the flattened (B·S) arrangement of each real token; None where nothing is padded."""
        width = self.shape[1]
        if all(length == width for length in self.lengths):
            return None
        return torch.cat([torch.arange(row * width, row * width + n) for row, n in enumerate(self.lengths)])

    def pad(self, packed: Tensor) -> Tensor:
        """(T, D) → (B, S, D), zeros where there is no token."""
        if self.places is None:
            return packed.view(*self.shape, -1)
        padded = packed.new_zeros(self.shape[0] * self.shape[1], packed.shape[-1])
        return padded.index_copy_(0, self.places.to(packed.device), packed).view(*self.shape, -1)

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, S, D) → (T, D)."""
        rows = padded.reshape(-1, padded.shape[-1])
        return rows if self.places is None else rows.index_select(0, self.places.to(padded.device))

    def group_rows(self, groups: Sequence[int]) -> list[tuple[int, Tensor | None]]:
        """(group, rows of this batch's packed tokens that belong to it); None stands for all rows."""
        of_example = [groups[example] for example in self.examples]
        if len(set(of_example)) == 1:
            return [(of_example[0], None)]
        of_token = torch.repeat_interleave(torch.tensor(of_example), torch.tensor(self.lengths))
        return [(group, torch.nonzero(of_token == group).flatten()) for group in sorted(set(of_example))]


def pack(lengths: Sequence[int], token_budget: int) -> list[Batch]:
    """Batches of at most `token_budget` padded tokens (at least one example each), longest examples first.

    The order depends only on the lengths, so the same calibration set always gives the same batches. The longest
    batch comes first: if memory does not suffice, it is known at once.
    """
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i))
    batches: list[Batch] = []
    start, at = 0, 0
    while at < len(order):
        count = max(1, token_budget // lengths[order[at]])
        members = tuple(order[at:at + count])
        batches.append(Batch(members, tuple(lengths[i] for i in members), start))
        start, at = batches[-1].stop, at + count
    return batches
