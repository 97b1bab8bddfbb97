"""The calibration ablation: accuracy by number of calibration examples, averaged over seeds, with 0-shot variants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emo_select.tables.layout import Layout
from emo_select.tables.main import Checkpoint, has_published_recipe
from emo_select.tables.pool import Filters, plain_mean, pool
from emo_select.tables.read import Problem, Records, Run, Setting
from emo_select.tables.write import NAN, Cell, Table

FOLDERS = {"last": "nprune_ablation_tables", "first": "nprune_ablation_tables_first"}
NAME = "nprune_ablation"

Shots = tuple[int | None, int | None]
"""Shots in calibration texts and in evaluation; None is the task's own number."""
Column = tuple[int, int | str | None]
"""keep-k, and the number of examples: None is all, `RANDOM` random selection."""

RANDOM = "Random"
PUBLISHED_SHOTS: dict[Shots, tuple[str, ...]] = {
    (None, None): ("layerwise", "easy_ep", "random"), (0, 0): ("layerwise", "easy_ep"), (None, 0): ("layerwise",),
}


@dataclass(frozen=True)
class _Row:
    model: str
    shots: Shots
    method: str
    group: str

    def label(self, layout: Layout, published: bool) -> str:
        words = {(None, None): "", (0, 0): " (0-shot)", (None, 0): " (e0)"}
        select, evaluate = ("default" if n is None else n for n in self.shots)
        variant = words.get(self.shots, f" (select {select}, eval {evaluate})")
        method = layout.method(self.method)
        name = (published and method.published) or method.label
        return f"{layout.model(self.model)} ({name}{variant}) / {self.group}"


def calibration_table(
    records: Records, layout: Layout, *, checkpoint: Checkpoint = "last", published: bool = False,
    filters: Filters = Filters(),  # noqa: B008 - frozen
) -> tuple[list[Table], list[Problem]]:
    """Rows model (method, shots) / group; columns keep-k × (random, 1, 5, …, all examples); no table without a value.

    A cell is the mean over the group's tasks, those the labels list, of the mean over seeds, in the metric of the
    group; it is empty when a task is missing. Random selection stands beside the default and the evaluation-shots
    variants. Rows without a value are left out, columns that no row has any task of too. `published` reads the
    published models, keep-k, sample sizes and seeds only, and has their rows.
    """
    runs = filters.resolved(records, layout).apply(records, layout).runs
    runs = [run for run in runs if _published(run, layout)] if published else runs
    cells = _Cells(runs, layout, checkpoint, published, filters)
    rows = [(row, [cells.value(row, column) for column in cells.columns]) for row in cells.rows]
    rows = [(row, values) for row, values in rows if any(v == v for v in values)]
    kept = [i for i, column in enumerate(cells.columns) if column in cells.begun]
    body: list[list[Cell]] = [[row.label(layout, published), *(values[i] for i in kept)] for row, values in rows]
    heads = ["model / task", *(_head(cells.columns[i]) for i in kept)]
    return [Table(NAME, heads, body)] if body else [], list(cells.problems)


def _published(run: Run, layout: Layout) -> bool:
    p, s = layout.published, run.setting
    model, shots = layout.models.get(s.model), (s.shots, s.eval_shots)
    return bool(
        model and model.ablation and has_published_recipe(run, layout) and run.seed in p.seeds
        and s.keep_k in p.ablation_keep_ks and (s.examples is None or s.examples in p.ablation_examples)
        and s.method in PUBLISHED_SHOTS.get(shots, ())
    )


def _head(column: Column) -> str:
    keep_k, n = column
    return f"keepk_{keep_k} ({n or 'All'})"


class _Cells:
    """All values of the table, by row and column."""

    def __init__(self, runs: Sequence[Run], layout: Layout, checkpoint: Checkpoint, published: bool,
                 filters: Filters) -> None:
        self.layout, self.published, self.problems = layout, published, dict[Problem, None]()
        self.begun: set[Column] = set()
        self.groups = self._groups(runs, filters.tasks)
        metrics = {layout.metric_of(group) for group in self.groups}
        self.values = {
            m: {key: e.value for key, e in pool(runs, checkpoint, m, as_written=published).items()} for m in metrics
        }
        settings = {run.setting for run in runs}
        self.columns = self._columns(settings)
        self.rows = self._rows(settings)

    def value(self, row: _Row, column: Column) -> float:
        """The mean over the group's tasks, NaN where none or only some exist."""
        setting = _setting(row, column)
        tasks, values = self.groups[row.group], self.values[self.layout.metric_of(row.group)]
        found = [values[setting, task] for task in tasks if (setting, task) in values]
        if found:
            self.begun.add(column)
        if found and len(found) < len(tasks):
            text = f"{_head(column)} is empty: {len(found)} of {len(tasks)} tasks are there."
            self.problems[Problem("incomplete", row.label(self.layout, self.published), text)] = None
        return plain_mean(found) if found and len(found) == len(tasks) else NAN

    def _groups(self, runs: Sequence[Run], tasks: Sequence[str]) -> dict[str, list[str]]:
        """Groups in the order of the labels, each with all tasks that its average stands for (and were asked for)."""
        found = dict.fromkeys(run.task for run in runs if self.layout.averaged(run.task))
        names = [group for group in self.layout.grouped(found)
                 if group in self.layout.published.ablation_groups or not self.published]
        members = {group: self.layout.members(group, found) for group in names}
        return {g: [task for task in listed if not tasks or task in tasks] for g, listed in members.items()}

    def _columns(self, settings: Iterable[Setting]) -> list[Column]:
        keep_ks = sorted({s.keep_k for s in settings if s.keep_k is not None})
        sizes = sorted({s.examples for s in settings if s.examples is not None})
        return [(keep_k, n) for keep_k in keep_ks for n in (RANDOM, *sizes, None)]

    def _rows(self, settings: set[Setting]) -> list[_Row]:
        models = self.layout.ordered({s.model for s in settings}, self.layout.models)
        order: list[Shots] = [(None, None), (0, 0), (None, 0)]
        shots = {(s.shots, s.eval_shots) for s in settings}
        order = [s for s in order if s in shots] + sorted(shots - set(order), key=str)
        return [_Row(model, variant, method, group) for model in models for variant in order
                for method in self._methods(model, settings) for group in self.groups]

    def _methods(self, model: str, settings: set[Setting]) -> list[str]:
        """Random selection has columns beside the rows of the others, and rows of its own only where it is alone."""
        if self.published:
            return [name for name, method in self.layout.methods.items() if method.published]
        found = {s.method for s in settings if s.model == model}
        return self.layout.ordered(found - {"random"} or found, self.layout.methods)


def _setting(row: _Row, column: Column) -> Setting:
    keep_k, n = column
    if isinstance(n, str):
        return Setting(model=row.model, keep_k=keep_k, method="random", eval_shots=row.shots[1])
    return Setting(model=row.model, keep_k=keep_k, method=row.method, examples=n, shots=row.shots[0],
                   eval_shots=row.shots[1])
