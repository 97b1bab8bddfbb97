"""From runs to numbers: choose runs, pool seeds, average tasks, carry standard errors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from statistics import fmean, variance
from typing import Literal

from emo_select.errors import UnknownNameError
from emo_select.spec import model_directory
from emo_select.tables.layout import Layout
from emo_select.tables.read import Records, Result, Run, Setting

Stage = Literal["first", "last", "before", "after"]


@dataclass(frozen=True)
class Filters:
    """Which runs enter; an empty tuple lets everything pass. Models by folder, hub id or label."""

    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    keep_ks: tuple[int, ...] = ()

    def apply(self, records: Records, layout: Layout) -> Records:
        """Keep the runs that match; a name that nothing in the tree has is an `UnknownNameError`."""
        chosen = self.resolved(records, layout)
        beside = replace(chosen, methods=(), keep_ks=())
        runs = [run for run in records.runs if beside._passes(run, layout)]
        shown = [run for run in runs if chosen._passes(run, layout)]
        return replace(records, runs=shown, context=runs)

    def resolved(self, records: Records, layout: Layout) -> Filters:
        """The same filters with every model as its folder name and every name checked."""
        runs = records.runs
        folders = {run.setting.model for run in runs} | {name for name, m in layout.models.items() if m.published}
        names = {layout.model(name): name for name in folders} | {name: name for name in folders}
        tasks = {run.task for run in runs} | {task for group in layout.groups.values() for task in group.tasks}
        groups = {name: name for name in {layout.group_of(task) for task in tasks} | set(layout.groups)}
        groups |= {layout.group(name): name for name in groups}
        return Filters(
            models=tuple(records.folder_of(name) or _model(name, names) for name in self.models),
            tasks=tuple(_known("task", name, {task: task for task in tasks}) for name in self.tasks),
            groups=tuple(_known("group", name, groups) for name in self.groups),
            methods=tuple(_known("method", name, {m: m for m in layout.methods}) for name in self.methods),
            keep_ks=self.keep_ks,
        )

    def _passes(self, run: Run, layout: Layout) -> bool:
        setting = run.setting
        return (
            (not self.models or setting.model in self.models)
            and (not self.tasks or run.task in self.tasks)
            and (not self.groups or layout.group_of(run.task) in self.groups)
            and (not self.methods or setting.method in self.methods)
            and (not self.keep_ks or setting.keep_k in self.keep_ks)
        )


def _model(name: str, folders: dict[str, str]) -> str:
    return folders.get(name) or _known("model", model_directory(name) if "/" in name else name, folders)


def _known(kind: str, name: str, known: dict[str, str]) -> str:
    if name not in known:
        raise UnknownNameError(kind, name, known)
    return known[name]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error (None where it cannot be had) over `seeds` runs of a task's `documents`."""

    value: float
    error: float | None = None
    seeds: int = 1
    documents: int | None = None


def estimate(result: Result, metric: str, *, as_written: bool = False) -> Estimate | None:
    """A metric of one checkpoint; its error as recorded, else binomial for a share of documents.

    A value that is not finite is none, except `as_written`: the published tables count NaN as a value.
    """
    value = result.metrics.get(metric)
    if value is None or not (as_written or math.isfinite(value)):
        return None
    return Estimate(value, _error(result, metric, value), documents=result.count)


def _error(result: Result, metric: str, value: float) -> float | None:
    if metric in result.errors:
        return result.errors[metric]
    share = metric.startswith(("acc", "exact_match", "primary_score")) and 0 <= value <= 1
    if not share or not result.count or result.count < 2:
        return None
    return math.sqrt(value * (1 - value) / (result.count - 1))


def results_of(runs: Iterable[Run]) -> list[Result]:
    """The results that runs have, at any stage."""
    return [result for run in runs for result in run.results.values() if result]


def pool(runs: Iterable[Run], stage: Stage, metric: str, *, as_written: bool = False
         ) -> dict[tuple[Setting, str], Estimate]:
    """(setting, task) -> the mean over seeds. Runs without this metric are left out; `as_written`: see `estimate`."""
    found: dict[tuple[Setting, str], list[Estimate]] = defaultdict(list)
    for run in runs:
        result: Result | None = getattr(run, stage)
        value = estimate(result, metric, as_written=as_written) if result else None
        if value is not None:
            found[run.setting, run.task].append(value)
    return {key: over_seeds(values) for key, values in found.items()}


def over_seeds(values: Sequence[Estimate]) -> Estimate:
    """Mean over seeds. All seeds see the same documents, so the sampling error does not shrink with their number;
    what the draw of the seed adds (variance between seeds / seeds) is added to it."""
    if len(values) == 1:
        return values[0]
    mean = plain_mean([value.value for value in values])
    between = variance([value.value for value in values]) / len(values)
    errors = [value.error for value in values if value.error is not None]
    sampling = fmean(error**2 for error in errors) if len(errors) == len(values) else 0.0
    documents = max((value.documents or 0 for value in values), default=0) or None
    return Estimate(mean, math.sqrt(sampling + between), len(values), documents)


def plain_mean(values: Sequence[float]) -> float:
    """The mean from a sum in order, rounded after each addition: what the published tables round to four decimals."""
    return reduce(add, values) / len(values)


def over_tasks(values: Sequence[Estimate]) -> Estimate:
    """Unweighted mean over tasks; their documents are independent, so variances add."""
    errors = [value.error for value in values if value.error is not None]
    error = math.sqrt(sum(e**2 for e in errors)) / len(values) if len(errors) == len(values) else None
    documents = [value.documents for value in values]
    total = None if None in documents else sum(count or 0 for count in documents)
    return Estimate(fmean(value.value for value in values), error, max(value.seeds for value in values), total)
