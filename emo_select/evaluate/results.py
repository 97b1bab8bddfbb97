"""The result files: published names and keys; of our own standard errors, problem rows and a hash of each question.

    task-<alias>-metrics.json        averages over the evaluated documents
    task-<alias>-predictions.jsonl   one line per document, in order
    per_subject/<subject>/…          the same two for the parts of a task, from the same predictions

The metrics file is written last: where it stands, the others are complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emo_select.errors import CheckpointError
from emo_select.storage import json_bytes, read_json, write_output
from emo_select.tasks.base import Doc, Task
from emo_select.tasks.headline import Score, scores_of

MMLU_NAMES = "mmlu_merged_"  # how the run names of subjects begin
PER_SUBJECT = "per_subject"


@dataclass(frozen=True)
class Outcome:
    """What was evaluated: documents and `Task.prediction` of each, in order, with their numbers in the test split."""

    numbers: Sequence[int]
    docs: Sequence[Doc]
    predictions: Sequence[Mapping[str, Any]]

    def part(self, group: str) -> Outcome:
        """The documents of one group, numbered from 0 as if the group were a task of its own."""
        rows = [index for index, doc in enumerate(self.docs) if doc["group"] == group]
        docs = [{**self.docs[row], "native_id": place} for place, row in enumerate(rows)]
        return Outcome(range(len(rows)), docs, [self.predictions[row] for row in rows])


@dataclass(frozen=True)
class Heading:
    """What a metrics file says besides metrics."""

    task_hash: str
    model_hash: str
    task_config: Mapping[str, Any]
    model_config: Mapping[str, Any]
    compute_config: Mapping[str, Any]
    processing_time: float
    row_issues: Mapping[str, Any]
    task_idx: int = 0


def metrics_path(folder: Path, task: Task) -> Path:
    """Metrics file of a task."""
    return folder / f"task-{_stem(task)}-metrics.json"


def predictions_path(folder: Path, task: Task) -> Path:
    """Predictions file of a task."""
    return folder / f"task-{_stem(task)}-predictions.jsonl"


def finished_metrics(folder: Path, task: Task, task_hash: str, model_hash: str) -> dict[str, Any] | None:
    """Metrics of an earlier, complete evaluation of the same questions to the same model."""
    try:
        content = read_json(metrics_path(folder, task))
    except CheckpointError:
        return None
    same = content.get("task_hash") == task_hash and content.get("model_hash") == model_hash
    return dict(content["metrics"]) if same and predictions_path(folder, task).exists() else None


def result_files(folder: Path, task: Task) -> list[Path]:
    """All files that `write_results` may write."""
    places = {folder: task} | {folder / PER_SUBJECT / _subject(part): part for part in task.subtasks()}
    return [path(*place) for place in places.items() for path in (metrics_path, predictions_path)]


def read_scores(folder: Path, task: Task) -> list[Score]:
    """The headline of a task's metrics file, with error and count, and what is shown beside it."""
    return scores_of(read_json(metrics_path(folder, task)), task.group, task.primary_metric)


def write_results(folder: Path, task: Task, outcome: Outcome, heading: Heading) -> dict[str, Any]:
    """Write all files of one task; returns its metrics."""
    for part in task.subtasks():
        subject = _subject(part)
        answered = outcome.part(subject)
        if answered.docs:
            _write(folder / PER_SUBJECT / subject, part, answered, heading)
    return _write(folder, task, outcome, heading)


def _subject(part: Task) -> str:
    return part.name.removeprefix(MMLU_NAMES)


def _write(folder: Path, task: Task, outcome: Outcome, heading: Heading) -> dict[str, Any]:
    per_doc = [prediction["metrics"] for prediction in outcome.predictions]
    metrics: dict[str, Any] = finite(task.aggregate(per_doc, outcome.docs))
    lines = (json.dumps(finite(line), ensure_ascii=False) for line in _prediction_lines(task, outcome, heading))
    write_output(predictions_path(folder, task), "".join(f"{line}\n" for line in lines).encode())
    content = {
        "task_name": task.alias,
        "task_hash": heading.task_hash,
        "model_hash": heading.model_hash,
        "model_config": heading.model_config,
        "task_config": {"task_name": task.alias, "task_core": task.name, "default_shots": task.default_shots,
                        **heading.task_config,
                        "primary_metric": task.primary_metric, "headline_metric": task.headline_metric},
        "compute_config": heading.compute_config,
        "processing_time": heading.processing_time,
        "current_date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "num_instances": len(outcome.docs),
        "metrics": metrics,
        "standard_errors": finite(task.standard_errors(per_doc, outcome.docs)),
        "row_issues": heading.row_issues,
        "task_idx": heading.task_idx,
    }
    write_output(metrics_path(folder, task), json_bytes(content))
    return metrics


def _prediction_lines(task: Task, outcome: Outcome, heading: Heading) -> list[dict[str, Any]]:
    return [
        {"doc_id": number, "native_id": doc["native_id"], "question_hash": task.question_hash(doc),
         "metrics": prediction["metrics"], "model_output": prediction["model_output"], "label": prediction["label"],
         "task_hash": heading.task_hash, "model_hash": heading.model_hash}
        for number, doc, prediction in zip(outcome.numbers, outcome.docs, outcome.predictions, strict=True)
    ]


def finite(value: Any) -> Any:
    """`value` with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _stem(task: Task) -> str:
    return task.alias.replace(":", "_").replace("/", "_")
