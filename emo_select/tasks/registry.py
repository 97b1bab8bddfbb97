"""Tasks by name: the published ones, the demo tasks, user files and lm-eval's own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from emo_select.errors import TaskError, UnknownNameError
from emo_select.tasks import mmlu, published
from emo_select.tasks.base import Task

PROVIDERS = ("emo_select.tasks.published", "emo_select.tasks.mmlu", "emo_select.demo.tasks")
LM_EVAL_PREFIXES = ("lm-eval:", "lm-eval-")  # as typed, and as it stands in directory names


def list_tasks(data_dir: str | Path | None = None) -> list[Task]:
    """Every task that can be named, in the published order; building them reads no data."""
    folder = Path(data_dir) if data_dir else None
    found: list[Task] = []
    for provider in PROVIDERS:
        found += importlib.import_module(provider).tasks(folder)
    return found


def groups(tasks: Sequence[Task]) -> Mapping[str, tuple[str, ...]]:
    """Names of the tasks of each group."""
    names: dict[str, tuple[str, ...]] = {}
    for task in tasks:
        names[task.group] = (*names.get(task.group, ()), task.name)
    return names


GROUPS = groups([*published.tasks(), *mmlu.tasks()])  # the five published groups


def short_name(name: str) -> str:
    """The name without what all published run names share: arc_easy, mmlu_math, gsm8k."""
    return name.replace("_generation_8shot", "").replace("_merged", "")


def get_tasks(names: Sequence[str], data_dir: str | Path | None = None) -> list[Task]:
    """The tasks of these names, each once, in this order.

    A name is a group, a run name or its short form, an MMLU subject (`mmlu_anatomy`), a YAML file, or
    `lm-eval:NAME`. Raises `UnknownNameError` with the nearest names.
    """
    folder = Path(data_dir) if data_dir else None
    known = list_tasks(folder)
    chosen: dict[tuple[str, str | None], Task] = {}
    for name in names:
        for task in _named(name, known, folder):
            chosen.setdefault((task.name, task.file), task)
    return list(chosen.values())


def remember(name: str, file: str) -> None:
    """Find the task of a file by `name` from now on; two files that give one name have different ones in a tree."""
    _user_files[name] = Path(file)


def task_file(name: str) -> str | None:
    """The file that this process has read the user task `name` from, as an absolute path; None for other tasks."""
    return str(_user_files[name]) if name in _user_files else None


def _named(name: str, known: Sequence[Task], data_dir: Path | None) -> Sequence[Task]:
    if name.endswith((".yaml", ".yml")):
        return [_user_task(Path(name), known)]
    if name.startswith(LM_EVAL_PREFIXES):
        from emo_select.tasks.lmeval import load_lm_eval

        return load_lm_eval(name[len(LM_EVAL_PREFIXES[0]):], data_dir)
    by_name: dict[str, Sequence[Task]] = {}
    for task in known:
        by_name[task.group] = [*by_name.get(task.group, ()), task]
    for task in known:  # a task's name wins over a group's: both gsm8k mean the same
        by_name[task.name] = by_name[short_name(task.name)] = [task]
    if name in by_name:
        return by_name[name]
    subjects = {prefix + subject: subject for values in mmlu.CATEGORIES.values() for subject in values
                for prefix in ("mmlu_", "mmlu_merged_")}
    if name in subjects:
        return mmlu.subject_tasks((subjects[name],), data_dir)
    if file := _file_named(name, data_dir):
        return [_user_task(file, known)]
    raise UnknownNameError("task", name, [*by_name, *subjects])


def _file_named(name: str, data_dir: Path | None) -> Path | None:
    """The task file of a user task that is given by its name: one loaded before, else NAME.yaml here or in the data."""
    folders = (Path(), *([data_dir] if data_dir else []))
    candidates = [_user_files[name]] if name in _user_files else [folder / f"{name}.yaml" for folder in folders]
    return next((file for file in candidates if file.is_file()), None)


_user_files: dict[str, Path] = {}  # task files loaded by this process, so that a run finds its task by name again


def _user_task(path: Path, known: Sequence[Task]) -> Task:
    from emo_select.tasks.userfile import load_task_file

    task = load_task_file(path)
    if task.name in {other for one in known for other in (one.name, short_name(one.name), one.group)}:
        raise TaskError(f"{path}: the name {task.name!r} is taken by a task of emo-select; choose another one.")
    task.file = str(path.resolve())
    remember(task.name, task.file)
    return task
