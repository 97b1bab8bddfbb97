"""The main results: models side by side at the same keep-k, with the number of tasks each one wins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from emo_select.tables.layout import Layout
from emo_select.tables.pool import Estimate, Stage, over_tasks, pool, results_of
from emo_select.tables.read import Problem, Records, Setting
from emo_select.tables.summary import experts_of, is_full
from emo_select.tables.write import Cell, Table

FULL = "full"
STAGES: tuple[Stage, Stage] = ("before", "after")


@dataclass
class _Block:
    """The settings that compete: same keep-k (all full models together), same method apart from full models."""

    keep_k: int | str
    stage: Stage
    settings: list[Setting]
    values: dict[Setting, dict[str, Estimate]]

    def common(self) -> list[str]:
        """Tasks that every competitor has."""
        return sorted(set.intersection(*(set(self.values[setting]) for setting in self.settings)))

    def wins(self) -> dict[Setting, int]:
        """Tasks of `common` on which a setting has the highest value; a tie counts for each of the best."""
        won = dict.fromkeys(self.settings, 0)
        for task in self.common():
            best = max(self.values[setting][task].value for setting in self.settings)
            for setting in self.settings:
                won[setting] += self.values[setting][task].value == best
        return won


def results_table(records: Records, layout: Layout, *, metric: str | None = None) -> tuple[list[Table], list[Problem]]:
    """One row per model, keep-k, method and stage: each group's average in its headline metric, and wins.

    Rows of one keep-k and stage compete; full models of any size, and models that skip selection, compete as `full`.
    Only tasks that all competitors have count for wins.
    """
    groups = layout.grouped({run.task for run in records.runs if layout.averaged(run.task)})
    experts = experts_of(records, layout)
    metrics = {group: metric or layout.headline(group, results_of(run for run in records.runs if run.task in tasks))
               for group, tasks in groups.items()}
    named = [[f"{layout.group(group)} ({metrics[group]})", f"± {layout.group(group)}"] for group in groups]
    columns = ["keep-k", "stage", "model", "method", *(name for pair in named for name in pair), "n", "wins", "of"]
    rows: list[list[Cell]] = []
    for stage in STAGES:
        values = _values(records, groups, stage, metrics)
        for block in _blocks(values, stage, layout, experts):
            rows += _rows(block, layout, groups)
    rows.sort(key=lambda row: (row[1] != "before", row[0] != FULL, -row[0] if isinstance(row[0], int) else 0))
    return [Table("results", columns, rows)], []


def _values(records: Records, groups: dict[str, list[str]], stage: Stage, metrics: dict[str, str]
            ) -> dict[Setting, dict[str, Estimate]]:
    values: dict[Setting, dict[str, Estimate]] = defaultdict(dict)
    for group, tasks in groups.items():
        members = [run for run in records.runs if run.task in tasks]
        for (setting, task), value in pool(members, stage, metrics[group]).items():
            values[setting][task] = value
    return values


def _blocks(values: dict[Setting, dict[str, Estimate]], stage: Stage, layout: Layout,
            experts: dict[str, int]) -> list[_Block]:
    by_keep_k: dict[int | str, list[Setting]] = defaultdict(list)
    for setting in values:
        by_keep_k[FULL if is_full(setting, experts) else setting.keep_k or FULL].append(setting)
    models, methods = list(layout.models), list(layout.methods)

    def order(setting: Setting) -> tuple[int, str, int, str]:
        model = models.index(setting.model) if setting.model in models else len(models)
        method = methods.index(setting.method) if setting.method in methods else len(methods)
        return model, setting.model, method, setting.note()

    return [_Block(keep_k, stage, sorted(found, key=order), values) for keep_k, found in by_keep_k.items()]


def _rows(block: _Block, layout: Layout, groups: dict[str, list[str]]) -> Sequence[list[Cell]]:
    wins, common = block.wins(), len(block.common())
    rows: list[list[Cell]] = []
    for setting in block.settings:
        found = block.values[setting]
        averages = [over_tasks([found[task] for task in tasks]) if all(task in found for task in tasks) else None
                    for tasks in groups.values()]
        cells: list[Cell] = [part for one in averages for part in ((one.value, one.error) if one else (None, None))]
        documents = sum(value.documents or 0 for value in found.values()) or None
        note = setting.note()
        label = layout.model(setting.model) + (f" ({note})" if note else "")
        rows.append([block.keep_k, block.stage, label, layout.method(setting.method).label, *cells, documents,
                     wins[setting], common])
    return rows
