"""Per-document predictions of a checkpoint, and what changed between two of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emo_select.errors import CheckpointError

SUFFIX = "-predictions.jsonl"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One document: its score in the chosen metric and what the model answered (a choice's index, or text)."""

    doc: int
    native_id: str | int | None
    label: Any
    answer: Any
    score: float
    question: str | None = None
    """A hash of the question; None in files that others wrote."""


def predictions_file(folder: Path) -> Path | None:
    """The alphabetically first predictions file of a result folder, as for metrics."""
    return min(folder.glob(f"task-*{SUFFIX}"), default=None)


def read_predictions(path: Path, metric: str) -> Iterator[Prediction]:
    """Documents in file order; a damaged line or one without the metric is a `CheckpointError` naming its number."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield _prediction(json.loads(line), metric)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise CheckpointError(f"{path}, line {number}: no prediction with {metric} ({error!r}).") from None


def _prediction(row: dict[str, Any], metric: str) -> Prediction:
    score = row["metrics"][metric]
    return Prediction(int(row["doc_id"]), row.get("native_id"), row.get("label"), _answer(row, metric), float(score),
                      row.get("question_hash"))


def _answer(row: dict[str, Any], metric: str) -> Any:
    index = f"predicted_index_{metric.removeprefix('acc_')}"
    if index in row["metrics"]:
        return row["metrics"][index]
    output = row["model_output"][0]
    answer = output.get("model_answer")
    return output.get("continuation") if answer is None else answer


Pairs = list[tuple[Prediction, Prediction]]


def paired(one: Sequence[Prediction], other: Sequence[Prediction]) -> tuple[Pairs, str]:
    """The documents that both sides have, in the order of the first, and by what they were recognised.

    By the hash of the question where both sides have one, else by native id where each is an id of its own, else by
    position; the last two only where the labels agree. Of questions that repeat, the n-th ones belong together.
    """
    both = (one, other)
    if all(prediction.question for side in both for prediction in side):
        return _by([p.question for p in one], [p.question for p in other], one, other), "question"
    if all(_has_own_ids(side) for side in both):
        pairs, how = _by([p.native_id for p in one], [p.native_id for p in other], one, other), "native id"
    else:
        pairs, how = _by([p.doc for p in one], [p.doc for p in other], one, other), "position"
    return [(a, b) for a, b in pairs if a.label == b.label], how


def _has_own_ids(side: Sequence[Prediction]) -> bool:
    """Whether native ids tell documents apart and are more than their place in the file."""
    ids = [prediction.native_id for prediction in side]
    return len(set(ids)) == len(ids) and None not in ids and ids != [prediction.doc for prediction in side]


def _by(names: Sequence[Any], others: Sequence[Any], one: Sequence[Prediction], other: Sequence[Prediction]) -> Pairs:
    place = {name: index for index, name in enumerate(_numbered(others))}
    return [(one[index], other[place[name]]) for index, name in enumerate(_numbered(names)) if name in place]


def _numbered(names: Sequence[Any]) -> list[tuple[Any, int]]:
    """Each name with how often it occurred before."""
    seen: Counter[Any] = Counter()
    found = []
    for name in names:
        found.append((name, seen[name]))
        seen[name] += 1
    return found


def changed(
    full: Iterator[Prediction], pruned: Iterator[Prediction], limit: int
) -> list[tuple[Prediction, Prediction]]:
    """The first `limit` documents whose score differs, reading both files only as far as needed."""
    found = []
    for one, other in zip(full, pruned, strict=False):
        same = (one.doc, one.native_id, one.question) == (other.doc, other.native_id, other.question)
        if same and one.score != other.score:
            found.append((one, other))
            if len(found) == limit:
                break
    return found
