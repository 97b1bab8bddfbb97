"""Per-document predictions of a checkpoint, and what changed between two of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    return Prediction(int(row["doc_id"]), row.get("native_id"), row.get("label"), _answer(row, metric), float(score))


def _answer(row: dict[str, Any], metric: str) -> Any:
    index = f"predicted_index_{metric.removeprefix('acc_')}"
    if index in row["metrics"]:
        return row["metrics"][index]
    output = row["model_output"][0]
    answer = output.get("model_answer")
    return output.get("continuation") if answer is None else answer


def changed(
    full: Iterator[Prediction], pruned: Iterator[Prediction], limit: int
) -> list[tuple[Prediction, Prediction]]:
    """The first `limit` documents whose score differs, reading both files only as far as needed."""
    found = []
    for one, other in zip(full, pruned, strict=False):
        if one.doc == other.doc and one.score != other.score:
            found.append((one, other))
            if len(found) == limit:
                break
    return found
