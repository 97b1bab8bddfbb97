"""The default table: per model, keep-k, method and group what is left before and after finetuning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from emo_select.tables.evaluations import AS_IS
from emo_select.tables.layout import Layout
from emo_select.tables.pool import Estimate, Stage, over_tasks, pool, results_of
from emo_select.tables.read import Problem, Records, Run, Setting
from emo_select.tables.selection import keep_set_of
from emo_select.tables.write import Cell, Table

BYTES_PER_PARAMETER = 4  # the published checkpoints are stored in float32
COLUMNS = ["model", "keep-k", "method", "setting", "group", "metric", "tasks", "seeds", "n", "before", "± before",
           "after", "± after", "drop before", "drop after", "disk GB", "memory GB"]


@dataclass(frozen=True)
class SummaryRow:
    """A setting on one group of tasks. Averages are None where a task of the group is missing."""

    setting: Setting
    group: str
    metric: str
    found: int
    """Tasks with a value at either stage."""
    tasks: int
    """Tasks of this group that some run in view has."""
    before: Estimate | None
    after: Estimate | None
    drop_before: float | None
    """Full model minus this one, both before finetuning; positive is a loss."""
    drop_after: float | None
    """The same, both after finetuning."""
    disk_bytes: int | None
    memory_bytes: int | None
    full: bool

    @property
    def documents(self) -> int | None:
        """Documents that the averages are over, all tasks together."""
        return max((value.documents or 0 for value in (self.before, self.after) if value), default=0) or None

    def cells(self, layout: Layout) -> list[Cell]:
        """The row of the table."""
        setting, before, after = self.setting, self.before, self.after
        return [
            layout.model(setting.model), "full" if self.full else setting.keep_k, layout.method(setting.method).label,
            setting.note(), layout.group(self.group), self.metric, f"{self.found}/{self.tasks}",
            max(e.seeds if e else 1 for e in (before, after)), self.documents, *_both(before), *_both(after),
            self.drop_before, self.drop_after, _giga(self.disk_bytes), _giga(self.memory_bytes),
        ]


def summary_table(rows: Sequence[SummaryRow], layout: Layout) -> Table:
    """The summary as a table, all columns."""
    return Table("summary", COLUMNS, [row.cells(layout) for row in rows])


def summarise(records: Records, layout: Layout, *, metric: str | None = None) -> tuple[list[SummaryRow], list[Problem]]:
    """Average each group's tasks for every setting, seeds pooled.

    `metric` None takes the group's headline. The full model that drops are measured against may lie outside the
    filters. The standard error of an average assumes independent documents across tasks; see `pool.over_seeds` for
    seeds.
    """
    sizes, experts = _Sizes(records.runs, layout), experts_of(records, layout)
    averages = _averages(records.beside, layout, metric)
    shown = {(run.setting, layout.group_of(run.task)) for run in records.runs}
    rows = [
        _row(key, averages, layout, experts, sizes)
        for key in sorted(shown & set(averages.found), key=lambda key: _order(key, layout))
    ]
    return rows, [*_partial(averages.tasks, layout), *_problems(rows, layout, experts)]


def experts_of(records: Records, layout: Layout) -> dict[str, int]:
    """Experts per layer of each unpruned model, from the labels, else from its run with the largest keep-k."""
    known = {name: model.experts for name, model in layout.models.items() if model.experts}
    largest: dict[str, Run] = {}
    for run in records.beside:
        best = largest.get(run.setting.model)
        if run.setting.keep_k and (best is None or run.setting.keep_k > (best.setting.keep_k or 0)):
            largest[run.setting.model] = run
    for model, run in largest.items():
        keep_set = None if model in known else keep_set_of(records.root / run.directory)
        known |= {model: keep_set.experts} if keep_set else {}
    return known


def is_full(setting: Setting, experts: dict[str, int]) -> bool:
    """Whether a setting keeps every expert."""
    return setting.keep_k is None or setting.keep_k == experts.get(setting.model)


Key = tuple[Setting, str]  # setting, group


@dataclass
class _Averages:
    tasks: dict[str, list[str]]
    found: dict[Key, set[str]]
    metrics: dict[str, str]
    values: dict[tuple[Setting, str, Stage], Estimate]


def _averages(runs: Sequence[Run], layout: Layout, metric: str | None) -> _Averages:
    groups = layout.grouped({run.task for run in runs if layout.averaged(run.task)})
    result = _Averages(groups, defaultdict(set), {}, {})
    for group, tasks in groups.items():
        members = [run for run in runs if run.task in tasks]
        result.metrics[group] = metric or layout.headline(group, results_of(members))
        stages: tuple[Stage, Stage] = ("before", "after")
        for stage in stages:
            _fill(result, group, stage, pool(members, stage, result.metrics[group]))
        for run in members:
            _ = result.found[run.setting, group]  # a row for every setting, with a value or not
    return result


def _fill(result: _Averages, group: str, stage: Stage, values: dict[tuple[Setting, str], Estimate]) -> None:
    by_setting: dict[Setting, list[Estimate]] = defaultdict(list)
    for (setting, task), value in values.items():
        by_setting[setting].append(value)
        result.found[setting, group].add(task)
    for setting, found in by_setting.items():
        if len(found) == len(result.tasks[group]):
            result.values[setting, group, stage] = over_tasks(found)


def _row(key: Key, averages: _Averages, layout: Layout, experts: dict[str, int], sizes: _Sizes) -> SummaryRow:
    setting, group = key
    before, after = (averages.values.get((setting, group, stage)) for stage in ("before", "after"))
    full = _full(setting, group, averages, layout, experts)
    return SummaryRow(
        setting, group, averages.metrics[group], len(averages.found[key]), len(averages.tasks[group]), before, after,
        _drop(full.get("before"), before), _drop(full.get("after"), after),
        sizes.disk(setting), sizes.memory(setting), is_full(setting, experts),
    )


def _full(setting: Setting, group: str, averages: _Averages, layout: Layout,
          experts: dict[str, int]) -> dict[str, Estimate]:
    """The full model's averages to compare a setting with: same evaluation and recipe, same method if it was run.

    Which experts a method would keep does not matter when all are kept, nor do the calibration texts. Where no run
    kept all, an evaluation of the model as it is will do, before finetuning.
    """
    plain = Setting(model=setting.model, keep_k=None, method=AS_IS, eval_shots=setting.eval_shots)
    as_is = averages.values.get((plain, group, "before"))
    found: dict[str, Estimate] = {"before": as_is} if as_is and setting.variant is None else {}
    if setting.model not in experts:
        return found
    base = replace(setting, keep_k=experts[setting.model], examples=None, shots=None)
    methods = dict.fromkeys((setting.method, *layout.methods))
    runs: dict[str, Estimate] = {}
    for method in methods:
        for stage in ("before", "after"):
            value = averages.values.get((replace(base, method=method), group, stage))
            if value is not None:
                runs.setdefault(stage, value)
    return {**found, **runs}


def _drop(full: Estimate | None, value: Estimate | None) -> float | None:
    return full.value - value.value if full and value else None


def _order(key: Key, layout: Layout) -> tuple[Any, ...]:
    setting, group = key
    return (
        _place(setting.model, layout.models), -(setting.keep_k or 10**9), _place(setting.method, layout.methods),
        setting.note(), _place(group, layout.groups),
    )


def _place(name: str, known: dict[str, Any]) -> tuple[int, str]:
    return list(known).index(name) if name in known else len(known), name


def _partial(groups: dict[str, list[str]], layout: Layout) -> Iterable[Problem]:
    """Groups whose averages stand for fewer tasks than the labels list."""
    for group, tasks in groups.items():
        listed = layout.members(group, tasks)
        missing = [task for task in listed if task not in tasks]
        if missing:
            text = f"Its averages are over {len(tasks)} of its {len(listed)} tasks; not here: {', '.join(missing)}."
            yield Problem("part of a group", layout.group(group), text)


def _problems(rows: Sequence[SummaryRow], layout: Layout, experts: dict[str, int]) -> Iterable[Problem]:
    for row in rows:
        if 0 < row.found < row.tasks:
            name = f"{layout.model(row.setting.model)} keep-k {row.setting.keep_k} {row.setting.method}"
            text = f"{layout.group(row.group)} has no average: {row.found} of {row.tasks} tasks are there."
            yield Problem("incomplete", name, text)
    for model in sorted({row.setting.model for row in rows} - set(experts)):
        if not all(row.setting.keep_k is None for row in rows if row.setting.model == model):
            text = "How many experts the full model has is not known; add `experts` under `models` in a --labels file."
            yield Problem("full model", model, text)


class _Sizes:
    """Weights on disk and measured peak memory in evaluation, per setting: the largest over its runs."""

    def __init__(self, runs: Iterable[Run], layout: Layout) -> None:
        self._layout = layout
        self._disk: dict[Setting, int] = {}
        self._memory: dict[Setting, int] = {}
        for run in runs:
            for sizes, value in ((self._disk, run.disk_bytes), (self._memory, run.peak_memory)):
                if value:
                    sizes[run.setting] = max(value, sizes.get(run.setting, 0))

    def disk(self, setting: Setting) -> int | None:
        """Bytes of weights; where no checkpoint is at hand, from the parameter counts of the labels."""
        return self._disk.get(setting) or estimated_bytes(setting, self._layout)

    def memory(self, setting: Setting) -> int | None:
        """Peak bytes during evaluation: of the GPU where one was used, else of the process."""
        return self._memory.get(setting)


def estimated_bytes(setting: Setting, layout: Layout) -> int | None:
    """Size on disk of a model whose parameter counts are known, in the published float32."""
    model = layout.models.get(setting.model)
    keep_k = setting.keep_k or (model.experts if model else None)
    if model is None or model.parameters is None or keep_k is None:
        return None
    fixed, per_expert = model.parameters
    return BYTES_PER_PARAMETER * (fixed + keep_k * per_expert)


def _both(value: Estimate | None) -> tuple[float | None, float | None]:
    return (value.value, value.error) if value else (None, None)


def _giga(count: int | None) -> float | None:
    return None if count is None else count / 1e9
