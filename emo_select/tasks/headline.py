"""Which metric stands for a task wherever one number is shown, and that number with its error and count.

The paper reports acc_raw for multiple choice, exact_match for GSM8K and, in its tables, F1 for Gen5 (its text says
recall, which is shown beside it). Every other task is reported in its primary metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HEADLINES = {"mc9": "acc_raw", "gen5": "f1", "mmlu": "acc_raw", "mmlu_pro": "acc_raw", "gsm8k": "exact_match"}
"""Group of tasks -> metric; tables know the same groups by their labels."""
BESIDE = {"gen5": ("recall",)}
"""Metrics to show besides."""


@dataclass(frozen=True)
class Score:
    """A mean over `documents` documents with its standard error (None where it cannot be had)."""

    metric: str
    value: float | None
    error: float | None
    documents: int | None

    def __str__(self) -> str:
        """`acc_raw 0.4321 ± 0.0123 (n = 427)`."""
        value = "no value" if self.value is None else f"{self.value:.4f}"
        error = "" if self.error is None or self.value is None else f" ± {self.error:.4f}"
        count = "" if self.documents is None else f" (n = {self.documents:,})"
        return f"{self.metric} {value}{error}{count}"


def scores_of(content: Mapping[str, Any], group: str, primary: str) -> list[Score]:
    """The headline of one metrics file and what is shown beside it; `group` and `primary` are the task's."""
    metrics = content["metrics"]
    names = (HEADLINES.get(group, primary), *BESIDE.get(group, ()))
    return [_score(content, name) for name in names if name in metrics] or [_score(content, "primary_score")]


def _score(content: Mapping[str, Any], name: str) -> Score:
    errors = content.get("standard_errors") or {}
    return Score(name, _number(content["metrics"].get(name)), _number(errors.get(name)), content.get("num_instances"))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
