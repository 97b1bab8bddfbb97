"""Results of `eval --model` in a tree: models as they are, outside any run, told from runs by their method."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

FOLDER = "evaluations"
AS_IS = "as is"
"""The method of a model that nothing was selected from."""
_SWEEP = re.compile(r"sweep-([a-z_]+)/keepk-(\d+)")  # `eval --sweep-keep-k`: the full model, routed to some experts
_USUAL = {"max_length": 2048, "dtype": "float32", "add_bos_token": False, "model_type": "hf"}
_DEPTH = 3  # folders below FOLDER: other settings, and sweeps


def metrics_files(folder: str) -> Iterator[str]:
    """Metrics files of a model's evaluations, sorted, as paths below `folder`; not those of MMLU's subjects."""
    yield from sorted(_below(folder, "", _DEPTH))


def _below(folder: str, inside: str, depth: int) -> Iterator[str]:
    try:
        entries = list(os.scandir(f"{folder}/{inside}"))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.name.startswith("task-") and entry.name.endswith("-metrics.json"):
            yield inside + entry.name
        elif depth and entry.name != "per_subject" and not entry.name.startswith(".") and entry.is_dir():
            yield from _below(folder, f"{inside}{entry.name}/", depth - 1)


def about(content: Mapping[str, Any], path: str) -> dict[str, Any] | None:
    """What tells an evaluation apart: model, task and, as fields of a setting, the rest; None if it does not say.

    `path` is the file's, below the folder of evaluations.
    """
    task, model = content.get("task_config"), content.get("model_config")
    if not isinstance(task, dict) or not isinstance(model, dict) or not isinstance(task.get("task_core"), str):
        return None
    sweep = _SWEEP.search(path)
    shots, usual = task.get("num_shots"), task.get("default_shots")
    return {
        "task": task["task_core"], "model": str(model.get("model", "")),
        "keep_k": int(sweep[2]) if sweep else None, "method": sweep[1] if sweep else AS_IS,
        "eval_shots": shots if usual is not None and shots != usual else None,
        "variant": ", ".join(_words(task, model, named=sweep is not None)) or None,
        "whole": sweep is not None or not model.get("keep_set"),
    }


def _words(task: Mapping[str, Any], model: Mapping[str, Any], *, named: bool) -> Iterator[str]:
    if task.get("limit"):
        yield f"first {task['limit']} documents"
    if task.get("samples"):
        yield f"{len(task['samples'])} chosen documents"
    for name, usual in _USUAL.items():
        if model.get(name, usual) != usual:
            yield f"{name.replace('_', ' ')} {model[name]}"
    if model.get("keep_set"):
        yield "masked" if named else f"keep set {str(model['keep_set'])[:8]}"
