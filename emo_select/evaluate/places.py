"""Where the results of an evaluation lie: what differs in model, task file or settings never replaces another one.

The first evaluation of a task in a folder has the folder itself. Another one gets a subfolder named by what is not
usual about it, such as `limit-3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emo_select.errors import CheckpointError
from emo_select.evaluate.options import EvalOptions
from emo_select.evaluate.results import metrics_path
from emo_select.names import absolute
from emo_select.progress import say
from emo_select.spec import digest, model_directory
from emo_select.storage import read_json
from emo_select.tasks.base import Task

USUAL = EvalOptions()


def configs(
    model: str, task: Task, options: EvalOptions, keep_set: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`task_config` and `model_config` of a metrics file: every setting that tells two evaluations apart."""
    chosen = options.samples and sorted(set(options.samples.get(task.name, ())))
    shots = task.default_shots if options.num_shots is None else options.num_shots
    return ({"limit": options.limit, "split": "test", "num_shots": shots, "samples": chosen, "task_file": task.file},
            {"model": model, "model_path": absolute(model), "model_type": options.backend,
             "max_length": options.max_length, "dtype": options.precision, "add_bos_token": options.add_bos_token,
             "trust_remote_code": options.trust_remote_code, "keep_set": keep_set})


def place(folder: Path, model: str, task: Task, options: EvalOptions, keep_set: str | None = None) -> Path:
    """The folder of this evaluation: `folder`, unless a different evaluation of a task of that name lies there."""
    wanted = configs(model, task, options, keep_set)
    words = "_".join(_words(task, options, keep_set)) or "usual"
    named = [words, f"{model_directory(model)}_{words}", f"{words}-{digest(wanted)[:8]}"]
    candidates = [folder, *(folder / name for name in named)]
    chosen = next((one for one in candidates if _is_free(metrics_path(one, task), wanted)), candidates[-1])
    if chosen != folder:
        say(f"{task.name}: {folder} holds an evaluation of another model or with other settings; this one goes to "
            f"{chosen.name}/ in it.")
    return chosen


def _is_free(path: Path, wanted: tuple[Mapping[str, Any], Mapping[str, Any]]) -> bool:
    """Whether there is nothing yet, or an evaluation of the same kind."""
    if not path.exists():
        return True
    try:
        content = read_json(path)
        if "row_issues" not in content:
            return False  # not by this program
        found = content["task_config"], content["model_config"]
        return all(_agree(one, other) for one, other in zip(found, wanted, strict=True))
    except CheckpointError:
        return True  # cut short
    except (KeyError, TypeError, AttributeError):
        return False


def _agree(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether all that an older file says is what is wanted now. A model is known by its path, where it has one."""
    by_path = found.get("model_path") and wanted.get("model_path")
    ignored = {"trust_remote_code", *(["model"] if by_path else [])}
    return all(found[key] == value for key, value in wanted.items() if key in found and key not in ignored)


def _words(task: Task, options: EvalOptions, keep_set: str | None) -> list[str]:
    """What is not usual about it, as parts of a folder's name."""
    samples = options.samples.get(task.name) if options.samples else None
    named = {
        "shots": options.num_shots, "limit": options.limit, "samples": samples and digest(sorted(set(samples)))[:8],
        "length": options.max_length if options.max_length != USUAL.max_length else None,
        "dtype": options.precision if options.precision != USUAL.precision else None,
        "bos": "added" if options.add_bos_token else None,
        "backend": options.backend if options.backend != USUAL.backend else None,
        "keepset": keep_set and keep_set[:8],
    }
    return [f"{name}-{value}" for name, value in named.items() if value is not None]
