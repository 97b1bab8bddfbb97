"""Micro-batches: padded rows, or one row of several examples that do not see each other.

Shapes: B examples, T tokens of the longest one rounded up, P tokens of all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emo_select.finetune.examples import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

MULTIPLE = 8  # lengths are rounded up to it, as published

Row = dict[str, list[int]]


@dataclass(frozen=True)
class Padded:
    """Collates rows to (B, T), padded on the right; padding is no label and no attended position."""

    pad_token: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each (B, T)."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // MULTIPLE) * MULTIPLE

        def filled(key: str, value: int) -> Tensor:
            return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            "input_ids": filled("input_ids", self.pad_token),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": filled("labels", IGNORED),
        }


@dataclass(frozen=True)
class Packed:
    """Collates the same examples into one row (1, P) without padding.

    Positions restart with each example, from which transformers derives a mask that keeps them apart; no token
    predicts the first of the next example. Loss and gradients are those of `Padded`.
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`input_ids`, `position_ids`, `labels` and `shift_labels` (what position i predicts), each (1, P)."""
        import torch

        shifted = [[*row["labels"][1:], IGNORED] for row in rows]
        joined = {
            "input_ids": [token for row in rows for token in row["input_ids"]],
            "position_ids": [index for row in rows for index in range(len(row["input_ids"]))],
            "labels": [label for row in rows for label in row["labels"]],
            "shift_labels": [label for row in shifted for label in row],
        }
        return {key: torch.tensor([values]) for key, values in joined.items()}
