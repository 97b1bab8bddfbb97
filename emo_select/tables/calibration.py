"""The calibration ablation: accuracy by number of calibration examples, averaged over seeds, with 0-shot variants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from emo_select.tables.layout import Layout
from emo_select.tables.main import Checkpoint, has_published_recipe
from emo_select.tables.pool import Filters, pool
from emo_select.tables.read import Problem, Records, Run, Setting
from emo_select.tables.write import NAN, Cell, Table

FOLDERS = {"last": "nprune_ablation_tables", "first": "nprune_ablation_tables_first"}
NAME = "nprune_ablation"

Shots = tuple[int | None, int | None]
"""Shots in calibration texts and in evaluation; None is the task's own number."""


@dataclass(frozen=True)
class _Row:
    model: str
    shots: Shots
    method: str
    group: str

    def label(self, layout: Layout) -> str:
        words = {(None, None): "", (0, 0): " (0-shot)", (None, 0): " (e0)"}
        select, evaluate = ("default" if n is None else n for n in self.shots)
        variant = words.get(self.shots, f" (select {select}, eval {evaluate})")
        return f"{layout.model(self.model)} ({layout.method(self.method).label}{variant}) / {self.group}"


def calibration_table(
    records: Records, layout: Layout, *, checkpoint: Checkpoint = "last", published: bool = False,
    filters: Filters = Filters(),  # noqa: B008 - frozen
) -> tuple[Table, list[Problem]]:
    """Rows model (method, shots) / group; columns keep-k × (random, 1, 5, …, all examples).

    A cell is the mean over the group's tasks of the mean over seeds, in the metric the paper reports for the group;
    it is empty when a task is missing. Random selection stands beside the default and the evaluation-shots variants.
    Rows and columns without a value are left out. `published` reads the published models, keep-k, sample sizes and
    seeds only.
    """
    runs = filters.resolved(records, layout).apply(records, layout).runs
    runs = [run for run in runs if _published(run, layout)] if published else runs
    cells = _Cells(runs, layout, checkpoint, published)
    rows = [(row, [cells.value(row, keep_k, n) for keep_k, n in cells.columns]) for row in cells.rows]
    rows = [(row, values) for row, values in rows if any(v == v for v in values)]
    kept = [i for i, _ in enumerate(cells.columns) if any(values[i] == values[i] for _, values in rows)]
    body: list[list[Cell]] = [[row.label(layout), *(values[i] for i in kept)] for row, values in rows]
    heads = [f"keepk_{keep_k} ({n or 'All'})" for keep_k, n in cells.columns]
    return Table(NAME, ["model / task", *(heads[i] for i in kept)], body), list(cells.problems)


def _published(run: Run, layout: Layout) -> bool:
    p, s = layout.published, run.setting
    model = layout.models.get(s.model)
    return bool(
        model and model.ablation and has_published_recipe(run, layout) and run.seed in p.seeds
        and s.keep_k in p.ablation_keep_ks and (s.examples is None or s.examples in p.ablation_examples)
        and (s.shots, s.eval_shots) in ((None, None), (0, 0), (None, 0))
    )


RANDOM = "Random"


class _Cells:
    """All values of the table, by row and column."""

    def __init__(self, runs: Sequence[Run], layout: Layout, checkpoint: Checkpoint, published: bool) -> None:
        self.layout, self.problems = layout, dict[Problem, None]()
        self.groups = self._groups(runs, published)
        metrics = {layout.metric_of(group) for group in self.groups}
        self.values = {m: {key: e.value for key, e in pool(runs, checkpoint, m).items()} for m in metrics}
        settings = {run.setting for run in runs}
        self.columns = self._columns(settings)
        self.rows = self._rows(settings)

    def value(self, row: _Row, keep_k: int, n: int | str | None) -> float:
        """The mean over the group's tasks, NaN where none or only some exist."""
        random = n == RANDOM
        setting = Setting(
            model=row.model, keep_k=keep_k, method="random" if random else row.method,
            examples=None if random or isinstance(n, str) else n,
            shots=None if random else row.shots[0], eval_shots=row.shots[1],
        )
        tasks, values = self.groups[row.group], self.values[self.layout.metric_of(row.group)]
        found = [values[setting, task] for task in tasks if (setting, task) in values]
        if len(found) == len(tasks):
            return fmean(found)
        if found:
            column = f"keepk_{keep_k} ({n or 'All'})"
            text = f"{column} is empty: {len(found)} of {len(tasks)} tasks are there."
            self.problems[Problem("incomplete", row.label(self.layout), text)] = None
        return NAN

    def _groups(self, runs: Sequence[Run], published: bool) -> dict[str, list[str]]:
        tasks = {run.task for run in runs if self.layout.averaged(run.task)}
        groups = self.layout.grouped(tasks)
        return {g: t for g, t in groups.items() if g in self.layout.published.ablation_groups or not published}

    def _columns(self, settings: Iterable[Setting]) -> list[tuple[int, int | str | None]]:
        keep_ks = sorted({s.keep_k for s in settings if s.keep_k is not None})
        sizes = sorted({s.examples for s in settings if s.examples is not None})
        return [(keep_k, n) for keep_k in keep_ks for n in (RANDOM, *sizes, None)]

    def _rows(self, settings: set[Setting]) -> list[_Row]:
        layout = self.layout
        models = layout.ordered({s.model for s in settings}, layout.models)
        methods = layout.ordered({s.method for s in settings} - {"random"}, layout.methods)
        order: list[Shots] = [(None, None), (0, 0), (None, 0)]
        shots = {(s.shots, s.eval_shots) for s in settings}
        order = [s for s in order if s in shots] + sorted(shots - set(order), key=str)
        return [
            _Row(model, variant, method, group)
            for model in models for variant in order for method in methods for group in self.groups
        ]
