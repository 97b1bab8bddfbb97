"""Micro-batches: padded rows, or one row of several examples that do not see each other.

Prompts are masked, so few positions predict a label: the model computes logits at those alone (`logits_to_keep`),
which for a vocabulary of 100,000 saves most of the head's time and nearly all of its memory. The loss is the same.

Shapes: B examples, T tokens of the longest one rounded up, P tokens of all of them together, K kept positions.
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
        """`input_ids`, `attention_mask` and `labels`, each (B, T), and `predicting`."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // MULTIPLE) * MULTIPLE

        def filled(key: str, value: int) -> Tensor:
            return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        labels = filled("labels", IGNORED)
        return {
            "input_ids": filled("input_ids", self.pad_token),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": labels,
            **predicting(torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)),
        }


@dataclass(frozen=True)
class Packed:
    """Collates the same examples into one row (1, P) without padding.

    Positions restart with each example, from which transformers derives a mask that keeps them apart; no token
    predicts the first of the next example. Loss and gradients are those of `Padded`.
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`input_ids`, `position_ids` and `labels`, each (1, P), and `predicting`."""
        import torch

        shifted = [[*row["labels"][1:], IGNORED] for row in rows]
        joined = {
            "input_ids": [token for row in rows for token in row["input_ids"]],
            "position_ids": [index for row in rows for index in range(len(row["input_ids"]))],
            "labels": [label for row in rows for label in row["labels"]],
        }
        targets = torch.tensor([[label for row in shifted for label in row]])
        return {key: torch.tensor([values]) for key, values in joined.items()} | predicting(targets)


def predicting(targets: Tensor) -> dict[str, Tensor]:
    """From what each position predicts (B, T): `logits_to_keep` (K,), where any row has a label, and `shift_labels`
    (B, K), the labels there."""
    kept = (targets != IGNORED).any(dim=0).nonzero().flatten()
    return {"logits_to_keep": kept, "shift_labels": targets[:, kept]}
