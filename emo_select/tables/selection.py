"""What tables, the report and comparisons need of a run's keep set."""

from __future__ import annotations

from pathlib import Path

from emo_select.errors import CheckpointError
from emo_select.experts.keepset import KeepSet
from emo_select.tree import RunPaths


def kept_experts(directory: Path) -> list[list[int] | None] | None:
    """Experts kept per layer (None for dense layers) from selection.json; None where there is no readable one."""
    keep_set = _load(directory)
    return None if keep_set is None else [None if kept is None else list(kept) for kept in keep_set.experts]


def experts_in_selection(directory: Path) -> int | None:
    """Experts of the largest unpruned layer: by its scores, else by the highest kept index."""
    keep_set = _load(directory)
    if keep_set is None:
        return None
    scored = [len(scores) for scores in keep_set.scores or () if scores]
    return max([*scored, *(kept[-1] + 1 for kept in keep_set.experts if kept)], default=None)


def _load(directory: Path) -> KeepSet | None:
    path = RunPaths(directory).selection
    try:
        return KeepSet.load(path)
    except CheckpointError:
        return None
