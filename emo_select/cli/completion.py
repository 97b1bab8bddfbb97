"""What a shell offers as values: names known without a network, looked up only when somebody presses Tab."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

LISTS = ","  # list options take several values at once


def _last(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Complete what follows the last comma."""
    def complete(incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(LISTS)
        return [f"{before}{comma}{name}" for name in names() if name.startswith(begun)]
    return complete


def _models() -> list[str]:
    from emo_select.checkpoint import PUBLISHED, demo_names
    from emo_select.checkpoint.sources import DATA_DIR_VARIABLE, MODELS

    folder = Path(os.environ.get(DATA_DIR_VARIABLE) or ".") / MODELS
    fetched = [path.parent.relative_to(folder).as_posix() for path in folder.glob("*/*/config.json")]
    return list(dict.fromkeys([*demo_names(), *PUBLISHED, *fetched]))


def _tasks() -> list[str]:
    from emo_select.tasks import list_tasks
    from emo_select.tasks.registry import short_name

    found = list_tasks()
    files = [path.name for path in Path().glob("*.yaml")]
    return list(dict.fromkeys([*(task.group for task in found), *(short_name(task.name) for task in found), *files]))


def _methods() -> Iterable[str]:
    from emo_select.spec import METHODS

    return METHODS


def _scores() -> Iterable[str]:
    from emo_select.spec import SCORES

    return SCORES


def _stages() -> Iterable[str]:
    from emo_select.pipeline import STAGES

    return STAGES


models, tasks, methods, scores, stages = map(_last, (_models, _tasks, _methods, _scores, _stages))


def runs(incomplete: str) -> list[str]:
    """Run directories of the usual tree."""
    root = Path(os.environ.get("EMO_SELECT_OUTPUT_DIR") or "selective_evals_final")
    return [str(path) for path in sorted(root.glob("*/*_keepk_*")) if str(path).startswith(incomplete)]


def sweeps(incomplete: str) -> list[str]:
    """Shipped sweeps, and those of the usual tree."""
    from emo_select.sweeps.spec import shipped_names

    root = Path(os.environ.get("EMO_SELECT_OUTPUT_DIR") or "selective_evals_final") / ".sweeps"
    mine = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return [name for name in dict.fromkeys([*mine, *shipped_names()]) if name.startswith(incomplete)]
