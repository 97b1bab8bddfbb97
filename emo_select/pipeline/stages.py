"""Doing what plans say: one function per stage, each from files to files, each finished by its record."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from emo_select import progress, record
from emo_select.errors import EmoSelectError
from emo_select.pipeline.plan import Action, Step, downstream, evaluated_steps
from emo_select.pipeline.runs import ONE_PASS, Run, checkpoint_fingerprint
from emo_select.record import Measurement, RunRecord
from emo_select.tree import exclusive

if TYPE_CHECKING:
    from emo_select.experts import KeepSet, StreamOptions
    from emo_select.tasks import Example

Planned = tuple[Run, Sequence[Step]]
Work = Callable[[Run, Measurement], list[Path]]
"""Does a stage, adds notes to the measurement, returns what it wrote."""


def execute_all(planned: Sequence[Planned]) -> list[tuple[Run, EmoSelectError]]:
    """Do every step that is marked to run; returns the runs that failed, after doing all the others.

    Selections that read the same layers for several keep-k share one pass.
    """
    failed: dict[int, EmoSelectError] = {}
    for group in _shared_selections(planned):
        _guarded(failed, group, lambda group=group: _select_together([run for run, _ in group]))
    for item in planned:
        if id(item[0]) not in failed:
            _guarded(failed, [item], lambda item=item: execute(*item))
    return [(run, failed[id(run)]) for run, _ in planned if id(run) in failed]


def execute(run: Run, steps: Sequence[Step]) -> None:
    """Do the steps of one run that are marked; each is recorded as soon as its files are in place."""
    with exclusive(run.paths.lock):
        for step in steps:
            if step.action is Action.RUN and not _already(run, step):
                _WORK[step.stage](run)


def _guarded(failed: dict[int, EmoSelectError], items: Sequence[Planned], work: Callable[[], None]) -> None:
    try:
        work()
    except EmoSelectError as error:
        if len(items) == len(failed) == 0:
            raise
        failed |= {id(run): error for run, _ in items}
        progress.say(f"{items[0][0].paths.directory.name}: {error}")
