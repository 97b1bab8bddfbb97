"""Where few-shot examples come from. The published ones are rows of the train split, looked up by identity."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emo_select.progress import say_once
from emo_select.tasks.base import Doc, Row, Task, no_shots

__all__ = ["by_identity", "by_row", "first_rows", "no_shots", "text_key", "written"]
Shots = Callable[[Task], Mapping[str, Sequence[Doc]]]


def text_key(text: str) -> str:
    """The first 12 hexadecimal digits of a text's SHA-256: names a row without copying it."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def by_identity(identity: Callable[[Row], Any], wanted: Sequence[Any]) -> Shots:
    """The train rows whose `identity` is in `wanted`, in that order; if one is missing, the first train rows."""

    def find(task: Task) -> Mapping[str, Sequence[Doc]]:
        rows = task.sources[0].rows("train")
        found: dict[Any, Row] = {}
        for row in rows:
            found.setdefault(identity(row), row)
        return _shots(task, rows, [found[key] for key in wanted if key in found], len(wanted))

    return find


def by_row(wanted: Sequence[int], train_rows: int) -> Shots:
    """The train rows at these positions of the complete split of `train_rows` rows; else the first train rows."""

    def find(task: Task) -> Mapping[str, Sequence[Doc]]:
        rows = task.sources[0].rows("train")
        chosen = [rows[index] for index in wanted] if len(rows) == train_rows else []
        return _shots(task, rows, chosen, len(wanted))

    return find


def _shots(task: Task, rows: Sequence[Row], chosen: Sequence[Row], count: int) -> Mapping[str, Sequence[Doc]]:
    if len(chosen) < count:
        say_once(f"Warning: {task.name}: the train split lacks {count - len(chosen)} of the {count} published "
                 f"few-shot rows; using its first {count} rows instead.")
        chosen = rows[:count]
    return {"": [task.document(row, index, "few-shot") for index, row in enumerate(chosen)]}


def first_rows(split: str, count: int, *, keep: Callable[[Row], bool] = lambda row: True) -> Shots:
    """The first `count` stored rows of a split that `keep` accepts, per group of the task."""

    def find(task: Task) -> Mapping[str, Sequence[Doc]]:
        groups: dict[str, list[Doc]] = {}
        for row in (row for source in task.sources for row in source.rows(split) if keep(row)):
            docs = groups.setdefault(task.group_of(row), [])
            if len(docs) < count:
                docs.append(task.document(row, len(docs), f"few-shot ({split})"))
        return groups

    return find


def written(docs: Callable[[], Sequence[Doc]]) -> Shots:
    """Examples that are not rows of the data set."""
    return lambda task: {"": docs()}
