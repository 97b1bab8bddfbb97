"""The published per-metric tables: a row per model and keep-k, a column per task and method, group averages first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from emo_select.tables.evaluations import AS_IS
from emo_select.tables.layout import Layout
from emo_select.tables.pool import Filters, plain_mean, pool
from emo_select.tables.read import Problem, Records, Run, Setting
from emo_select.tables.write import NAN, Cell, Table

Checkpoint = Literal["first", "last"]
CHECKPOINTS: tuple[Checkpoint, Checkpoint] = ("last", "first")
FOLDERS = {"last": "prune_eval_tables_final", "first": "prune_eval_tables_final_ckpt0"}


@dataclass(frozen=True)
class Row:
    """One row: its label and the setting it shows, the method apart (methods are columns)."""

    label: str
    setting: Setting


Values = dict[tuple[Setting, str, str], float]
"""(setting without its method, task, method) -> value."""


def main_tables(
    records: Records, layout: Layout, *, checkpoint: Checkpoint = "last", metrics: Sequence[str] = (),
    published: bool = False, filters: Filters = Filters(),  # noqa: B008 - frozen
) -> tuple[list[Table], list[Problem]]:
    """Tables named `<metric>/<group>` and `<metric>/aggregate`, and what left their averages empty.

    `published` fixes the rows to the published models and keep-k and reads only runs of the published recipe; else
    every run has a row. A task column that is empty for all rows is left out, of the averages too; an average with an
    empty cell is empty. A table without a value is none.
    """
    filters = filters.resolved(records, layout)
    runs = filters.apply(records, layout).runs
    runs = [run for run in runs if is_published(run, layout)] if published else runs
    rows = published_rows(layout, filters) if published else found_rows(runs, layout)
    tables: list[Table] = []
    problems: dict[Problem, None] = {}
    for metric in metrics or layout.published.metrics:
        pooled = pool(runs, checkpoint, metric, as_written=published)
        values = {(_row(s), task, s.method): e.value for (s, task), e in pooled.items()}
        columns = _Columns(rows, values, layout, problems)
        made = [(group, *columns.group(group, tasks)) for group, tasks in _grouped(values, rows, layout).items()]
        parts = [(group, averages + cells) for group, averages, cells in made]
        parts.append(("aggregate", [column for _, averages, _ in made for column in averages]))
        tables += [Table(f"{metric}/{name}", *_joined(rows, part)) for name, part in parts if _has_value(part)]
    return tables, list(problems)


def is_published(run: Run, layout: Layout) -> bool:
    """Whether the published script finds this run: its recipe and tasks, no calibration options, the first seed."""
    return run.setting.default_calibration and run.seed == 0 and has_published_recipe(run, layout)


def outside_published(runs: Sequence[Run], layout: Layout, filters: Filters) -> list[Run]:
    """The runs that have no place in the published main or calibration tables."""
    rows = {row.setting for row in published_rows(layout, filters)}

    def ablation(run: Run) -> bool:
        model = layout.models.get(run.setting.model)
        return bool(model and model.ablation) and run.setting.keep_k in layout.published.ablation_keep_ks

    def shown(run: Run) -> bool:
        plain = run.setting.default_calibration and run.seed == 0
        return has_published_recipe(run, layout) and (_row(run.setting) in rows if plain else ablation(run))

    return [run for run in runs if not shown(run)]


def has_published_recipe(run: Run, layout: Layout) -> bool:
    """Whether the task is a listed one, batch size, learning rate and epochs are published, and nothing is changed."""
    s, p = run.setting, layout.published
    recipe = (s.batch_size, s.learning_rate, s.epochs, s.variant)
    usual = s.keep_k is None or recipe == (p.batch_size, p.learning_rate, p.epochs, None)
    return usual and s.method != AS_IS and layout.group_of(run.task) in layout.groups


def published_rows(layout: Layout, filters: Filters) -> list[Row]:
    """The rows of the published tables, whether the tree has them or not."""
    rows = []
    for name, model in layout.models.items():
        if not (model.published or name in filters.models) or (filters.models and name not in filters.models):
            continue
        for keep_k in model.keep_ks or layout.published.keep_ks:
            if not filters.keep_ks or keep_k in filters.keep_ks:
                label = layout.model(name) if model.one_row else f"{layout.model(name)} (keepk {keep_k})"
                rows.append(Row(label, _row(Setting(model=name, keep_k=keep_k, method=""))))
    return rows


def found_rows(runs: Sequence[Run], layout: Layout) -> list[Row]:
    """A row for every setting in the tree, in the order of the labels file, then by name, keep-k and note."""
    settings = {_row(run.setting) for run in runs}
    place = {name: i for i, name in enumerate(layout.ordered({s.model for s in settings}, layout.models))}
    ordered = sorted(settings, key=lambda s: (place[s.model], s.keep_k is None, s.keep_k or 0, s.note()))
    return [Row(row_label(setting, layout), setting) for setting in ordered]


def row_label(setting: Setting, layout: Layout) -> str:
    """`label (keepk K, what differs from the default)`."""
    model = layout.models.get(setting.model)
    plain = setting.keep_k is None or (model and model.one_row and setting.keep_k in (model.keep_ks or ()))
    parts = ["" if plain else f"keepk {setting.keep_k}", setting.note()]
    note = ", ".join(part for part in parts if part)
    return f"{layout.model(setting.model)} ({note})" if note else layout.model(setting.model)


def _row(setting: Setting) -> Setting:
    return replace(setting, method="")


def _grouped(values: Values, rows: Sequence[Row], layout: Layout) -> dict[str, list[str]]:
    shown = {row.setting for row in rows}
    return layout.grouped({task for setting, task, _ in values if setting in shown})


Column = tuple[str, list[float]]


def _has_value(columns: Sequence[Column]) -> bool:
    return any(value == value for _, column in columns for value in column)


def _joined(rows: Sequence[Row], columns: Sequence[Column]) -> tuple[list[str], list[list[Cell]]]:
    cells: list[list[Cell]] = [[row.label, *(column[i] for _, column in columns)] for i, row in enumerate(rows)]
    return ["model", *(name for name, _ in columns)], cells


@dataclass
class _Columns:
    rows: list[Row]
    values: Values
    layout: Layout
    problems: dict[Problem, None]

    def group(self, group: str, tasks: list[str]) -> tuple[list[Column], list[Column]]:
        """Average columns and task columns of one group, methods side by side."""
        methods = self.layout.ordered({method for _, _, method in self.values}, self.layout.methods)
        present = {(t, m): column for t in tasks for m in methods if (column := self._column(t, m)) is not None}
        named = [(f"{task} ({self._short(m)})", column) for (task, m), column in present.items()]
        average = self.layout.groups[group].average if group in self.layout.groups else None
        if average is None:
            return [], named
        averages = [
            (f"{average} ({self._short(m)})", self._average(f"{average} ({self._short(m)})", inside))
            for m in methods
            if (inside := {t: c for (t, n), c in present.items() if n == m and self.layout.averaged(t)})
        ]
        return averages, named

    def _short(self, method: str) -> str:
        return self.layout.method(method).short

    def _column(self, task: str, method: str) -> list[float] | None:
        keys = [(row.setting, task, method) for row in self.rows]
        return [self.values.get(k, NAN) for k in keys] if any(k in self.values for k in keys) else None

    def _average(self, name: str, columns: dict[str, list[float]]) -> list[float]:
        means = []
        for i, row in enumerate(self.rows):
            missing = [task for task, column in columns.items() if column[i] != column[i]]
            means.append(NAN if missing else plain_mean([column[i] for column in columns.values()]))
            if missing and len(missing) < len(columns):
                text = f"{name} is empty: {len(missing)} of {len(columns)} tasks are missing ({', '.join(missing)})."
                self.problems[Problem("incomplete", row.label, text)] = None
        return means
