"""What the report shows of a single run: spec, keep sets, losses, stages, metrics, changed predictions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from emo_select.errors import CheckpointError
from emo_select.tables.layout import PRIMARY, Layout
from emo_select.tables.pool import results_of
from emo_select.tables.predictions import Prediction, changed, read_predictions
from emo_select.tables.read import Records, Result, Run, Setting
from emo_select.tables.selection import as_bits, keep_set_of
from emo_select.tree import RunPaths

LOSS_POINTS = 100
ANSWER_LENGTH = 160  # characters


class Details:
    """Reads details run by run; `examples` changed predictions each, found by reading as little as possible."""

    def __init__(self, records: Records, layout: Layout, experts: dict[str, int], examples: int) -> None:
        self._root, self._layout, self._experts, self._examples = records.root, layout, experts, examples
        self._full = {
            (run.setting.model, run.task, run.setting.eval_shots): run for run in records.beside
            if run.setting.keep_k == experts.get(run.setting.model) or run.setting.keep_k is None
        }

    def of(self, run: Run) -> dict[str, Any]:
        """Everything about one run, as plain data."""
        paths = RunPaths(self._root / run.directory)
        record = _record(paths.record)
        return {
            "spec": record.get("spec") or _named(run.setting, run),
            "keep": self._keep(run, paths),
            "losses": thinned(_losses(record), LOSS_POINTS),
            "stages": _stages(record),
            "metrics": {step: _rounded(result) for step, result in sorted(run.results.items()) if result},
            "changed": self._changed(run),
        }

    def _keep(self, run: Run, paths: RunPaths) -> dict[str, Any] | None:
        keep_set = keep_set_of(paths.directory)
        if keep_set is None:
            return None
        total = max(self._experts.get(run.setting.model) or 0, keep_set.experts)
        return {"total": total, "layers": [None if kept is None else as_bits(kept, total) for kept in keep_set.kept]}

    def _changed(self, run: Run) -> list[list[Any]]:
        """Documents whose score differs between the full model and this one, both before finetuning."""
        full = self._full.get((run.setting.model, run.task, run.setting.eval_shots))
        if not self._examples or full is None or full is run:
            return []
        metric = self._layout.headline(self._layout.group_of(run.task), results_of([run]))
        files = [self._predictions(one) for one in (full, run)]
        if metric == PRIMARY or None in files:
            return []
        try:
            one, other = (read_predictions(path, metric) for path in files if path)
            return [_row(*pair) for pair in changed(one, other, self._examples)]
        except CheckpointError:
            return []

    def _predictions(self, run: Run) -> Path | None:
        return run.predictions(self._root, 0)


def thinned(points: list[Any], limit: int) -> list[Any]:
    """At most `limit` evenly spaced points, first and last among them."""
    if len(points) <= limit:
        return points
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]


def _record(path: Path) -> dict[str, Any]:
    try:
        content = from_json(path.read_bytes())
    except (OSError, ValueError):
        return {}  # reading the tree has named it as a problem
    return content if isinstance(content, dict) else {}


def _rounded(result: Result) -> dict[str, float | None]:
    """Six significant digits, which is what the page shows and half the size; JSON has no NaN."""
    return {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in result.metrics.items()}


def _named(setting: Setting, run: Run) -> dict[str, Any]:
    fields = ("keep_k", "method", "examples", "shots", "eval_shots", "batch_size", "learning_rate", "epochs", "variant")
    known = {name: getattr(setting, name) for name in fields}
    return {"task": run.task, "seed": run.seed, **{name: value for name, value in known.items() if value is not None}}


def _losses(record: dict[str, Any]) -> list[list[float]]:
    """[step, loss] per logged step of the finetuning."""
    try:
        history = record["stages"]["finetune"]["notes"]["history"]
        curve = [(entry.get("step", i + 1), entry["loss"]) for i, entry in enumerate(history) if "loss" in entry]
        return [[step, float(f"{loss:.4g}")] for step, loss in curve if math.isfinite(loss)]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _stages(record: dict[str, Any]) -> list[list[Any]]:
    stages = record.get("stages")
    fields = ("seconds", "peak_memory", "peak_gpu_memory", "device", "host", "started", "commit")
    if not isinstance(stages, dict):
        return []
    rows = [[name, *(done.get(field) for field in fields)] for name, done in stages.items() if isinstance(done, dict)]
    return [[*row[:-1], str(row[-1] or "")[:12]] for row in rows]


def _row(full: Prediction, pruned: Prediction) -> list[Any]:
    scores = f"{full.score:g} → {pruned.score:g}"
    return [full.doc, str(full.native_id), *map(_short, (full.label, full.answer, pruned.answer)), scores]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= ANSWER_LENGTH else text[: ANSWER_LENGTH - 1] + "…"
