"""The four kinds of table by name, as the command line and `run` ask for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from emo_select.errors import UnknownNameError
from emo_select.tables import calibration, main
from emo_select.tables.layout import Layout
from emo_select.tables.main import Checkpoint
from emo_select.tables.methods import methods_table
from emo_select.tables.pool import Filters
from emo_select.tables.read import Problem, Records
from emo_select.tables.results import results_table
from emo_select.tables.summary import summarise, summary_table
from emo_select.tables.write import Table

Made = tuple[list[Table], list[Problem]]


def make(
    kind: str, records: Records, layout: Layout, *, filters: Filters = Filters(),  # noqa: B008 - frozen
    metrics: Sequence[str] = (), rows: str = "auto", checkpoints: Sequence[Checkpoint] = ("last",),
) -> Made:
    """Tables of one kind (summary, methods, main, calibration, results) and the problems met on the way.

    `rows`: published, found, or auto (published where the tree has a published model); `checkpoints`: which of first
    and last the main and calibration tables read. A metric that no run has is an `UnknownNameError`.
    """
    layout = layout.naming(records.models)
    layout = layout.leading_with(filters.resolved(records, layout).models)
    known = {name for run in records.runs for result in run.results.values() if result for name in result.metrics}
    for metric in metrics:
        if metric not in known:
            raise UnknownNameError("metric", metric, known)
    published = rows == "published" or (rows == "auto" and _has_published(records, layout))
    if kind in ("main", "calibration"):
        tables, problems = _per_checkpoint(kind, records, layout, filters, metrics, published, checkpoints)
    else:
        tables, problems = _whole(kind, filters.apply(records, layout), layout, metrics[0] if metrics else None)
    return tables, [*records.problems, *dict.fromkeys(problems)]


def problems_table(problems: Sequence[Problem]) -> Table:
    """Problems as a table."""
    return Table("problems", ["kind", "where", "problem"], [[p.kind, p.path, p.message] for p in problems])


def _whole(kind: str, records: Records, layout: Layout, metric: str | None) -> Made:
    if kind == "results":
        return results_table(records, layout, metric=metric)
    rows, problems = summarise(records, layout, metric=metric)
    return [(methods_table if kind == "methods" else summary_table)(rows, layout)], problems


def _per_checkpoint(kind: str, records: Records, layout: Layout, filters: Filters, metrics: Sequence[str],
                    published: bool, checkpoints: Sequence[Checkpoint]) -> Made:
    tables: list[Table] = []
    problems = _left_out(records, layout, filters) if published else []
    for checkpoint in checkpoints:
        if kind == "main":
            found, met = main.main_tables(records, layout, checkpoint=checkpoint, metrics=metrics,
                                          published=published, filters=filters)
            folder = main.FOLDERS[checkpoint]
        else:
            found, met = calibration.calibration_table(records, layout, checkpoint=checkpoint, published=published,
                                                       filters=filters)
            folder = calibration.FOLDERS[checkpoint]
        tables += [replace(table, name=f"{folder}/{table.name}") for table in found]
        problems += met
    return tables, problems


def _has_published(records: Records, layout: Layout) -> bool:
    published = {name for name, model in layout.models.items() if model.published}
    return any(run.setting.model in published for run in records.runs)


def _left_out(records: Records, layout: Layout, filters: Filters) -> list[Problem]:
    """Runs that have no place among the published rows, per model."""
    runs = main.outside_published(filters.apply(records, layout).runs, layout, filters.resolved(records, layout))
    return [
        Problem("not shown", model, f"{count} of its runs have no place in the published rows; use --rows found.")
        for model, count in sorted(Counter(run.setting.model for run in runs).items())
    ]
