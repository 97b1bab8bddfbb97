"""Runs bound to a tree, with models and tasks opened once for all of them, and what each still has to do."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

from emo_select.errors import EmoSelectError
from emo_select.models.shapes import open_or_outline
from emo_select.pipeline.plan import Action, Step, plan
from emo_select.pipeline.runs import Run
from emo_select.spec import Execution
from emo_select.sweeps.graph import Unit
from emo_select.sweeps.spec import SweepRun
from emo_select.tasks import lengths
from emo_select.tree import Tree

if TYPE_CHECKING:
    from emo_select.checkpoint import Checkpoint
    from emo_select.tasks import Task

CONCERNS = {"activations": ("activations",), "select": ("select",)}
"""Stages that a unit of shared work is about; the other kinds are about whole runs."""


class Bench:
    """Binds runs to `tree`. Nothing is downloaded: what is not on this machine is absent and its runs are undone."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._models: dict[tuple[str, str | None], Checkpoint | None] = {}
        self._tasks: dict[str | None, dict[str, Task]] = {}
        self._runs: dict[SweepRun, Run] = {}
        self.problems: dict[SweepRun, str] = {}
        """Why a run cannot be planned here: something is not on this machine, or a record is damaged."""

    def bind(self, item: SweepRun) -> Run:
        """The run of `item`, sharing open models and tasks with all others."""
        if item not in self._runs:
            run = Run(item.spec, self.tree, item.execution)
            model = self.model(item.spec.source, item.execution.data_dir)
            if model is not None:
                run.__dict__["source"] = model
            run.__dict__["task"] = self.task(item.spec.task, item.execution)
            self._runs[item] = run
        return self._runs[item]

    def steps(self, item: SweepRun) -> list[Step] | None:
        """What each stage of the run has to do; None where that cannot be known here (see `problems`)."""
        missing = self.missing(item)
        if missing:
            self.problems[item] = missing
            return None
        try:
            return plan(self.bind(item))
        except EmoSelectError as error:
            self.problems[item] = str(error)
            return None

    def missing(self, item: SweepRun) -> str | None:
        """What a plan of the run needs and this machine does not have."""
        if self.model(item.spec.source, item.execution.data_dir) is None:
            return f"the model {item.spec.model} is not on this machine"
        task = self.task(item.spec.task, item.execution)
        return None if lengths.known(task) else f"the data of {task.name} ({task.dataset}) is not on this machine"

    def left(self, unit: Unit) -> list[SweepRun]:
        """Runs of the unit for which it still has to do something."""
        stages = CONCERNS.get(unit.kind)
        return [item for item in unit.runs if _works(self.steps(item), stages)]

    def why(self, unit: Unit) -> str:
        """The first reason for which the unit has work left."""
        stages = CONCERNS.get(unit.kind)
        for item in self.left(unit):
            steps = self.steps(item) or []
            reasons = [f"{step.stage}: {step.reason}" for step in steps if _marked(step, stages)]
            return reasons[0] if reasons else self.problems[item]
        return ""

    def model(self, name: str, data_dir: str | None) -> Checkpoint | None:
        """The opened model; where it is not on this machine, its shapes, or None."""
        key = (name, data_dir)
        if key not in self._models:
            self._models[key] = open_or_outline(*key)
        return self._models[key]

    def task(self, name: str, execution: Execution) -> Task:
        """The task's definition."""
        from emo_select.tasks import get_tasks, list_tasks

        folder = execution.data_dir
        known = self._tasks.setdefault(folder, {})
        if not known:
            known.update((task.name, remembering(task)) for task in list_tasks(folder))
        if name not in known:
            known[name] = remembering(get_tasks([execution.task_file or name], folder)[0])
        return known[name]


def pending(bench: Bench, units: Iterable[Unit]) -> dict[str, Unit]:
    """Units with work left, by name; `fetch` only where there is any other."""
    found = {unit.name: unit for unit in units if unit.kind != "fetch" and bench.left(unit)}
    fetch = [unit for unit in units if unit.kind == "fetch" and found]
    return {unit.name: unit for unit in fetch} | found


def remembering(task: Task) -> Task:
    """The task with a fingerprint that is computed once: a sweep asks for it thousands of times."""
    fingerprint = _Once(task)
    task.fingerprint = lambda: fingerprint.value  # type: ignore[method-assign]
    return task


class _Once:
    def __init__(self, task: Task) -> None:
        self._compute = task.fingerprint

    @cached_property
    def value(self) -> str:
        return self._compute()


def _works(steps: list[Step] | None, stages: tuple[str, ...] | None) -> bool:
    if steps is None:
        return True
    return any(_marked(step, stages) for step in steps)


def _marked(step: Step, stages: tuple[str, ...] | None) -> bool:
    return step.action is Action.RUN and (stages is None or step.stage in stages)
