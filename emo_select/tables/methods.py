"""Methods side by side: a row per model and keep-k, a column per method, before and after finetuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from emo_select.tables.evaluations import AS_IS
from emo_select.tables.layout import Layout
from emo_select.tables.pool import Estimate
from emo_select.tables.summary import SummaryRow
from emo_select.tables.write import Cell, Table

Line = tuple[str, Any, str, str]  # model, keep-k, setting without the method, group


def methods_table(rows: Sequence[SummaryRow], layout: Layout) -> Table:
    """The summary's averages with methods as columns, each cell `before → after` finetuning, each ± one standard error.

    A model with all experts is the same under every method, so its row shows the one run for all of them.
    """
    found = {row.setting.method for row in rows}
    methods = layout.ordered(found - {AS_IS} or found, layout.methods)  # a model as it is stands under all of them
    lines: dict[Line, dict[str, SummaryRow]] = {}
    for row in sorted(rows, key=lambda row: row.setting.method == "random"):
        for line in _lines(row, lines, layout):
            lines.setdefault(line, {})[row.setting.method] = row
    names = [str(layout.method(method).label) for method in methods]
    return Table("methods", ["model", "keep-k", "setting", "group", "metric", "n", *names],
                 [_cells(line, found, methods) for line, found in lines.items()])


def _lines(row: SummaryRow, lines: dict[Line, dict[str, SummaryRow]], layout: Layout) -> list[Line]:
    """Where a row belongs: random selection sees no calibration texts, so it stands beside any number of them."""
    own = _line(row, layout)
    if row.setting.method != "random":
        return [own]
    firsts = {line: next(iter(found.values())) for line, found in lines.items()}
    return [line for line, first in firsts.items() if own == _line(first, layout, calibrated=False)] or [own]


def _line(row: SummaryRow, layout: Layout, *, calibrated: bool = True) -> Line:
    setting = row.setting if calibrated else replace(row.setting, examples=None, shots=None)
    return layout.model(setting.model), "full" if row.full else setting.keep_k, setting.note(), layout.group(row.group)


def _cells(line: Line, found: dict[str, SummaryRow], methods: Sequence[str]) -> list[Cell]:
    any_row = next(iter(found.values()))
    shown = dict.fromkeys(methods, any_row) if any_row.full else found
    documents = max((row.documents or 0 for row in found.values()), default=0) or None
    return [*line, any_row.metric, documents, *(_cell(shown.get(method)) for method in methods)]


def _cell(row: SummaryRow | None) -> str | None:
    if row is None or (row.before is None and row.after is None):
        return None
    before, after = (_number(value) for value in (row.before, row.after))
    return before if row.after is None else f"{before} → {after}"


def _number(value: Estimate | None) -> str:
    if value is None:
        return "–"
    return f"{value.value:.3f}" + ("" if value.error is None else f"±{value.error:.3f}".replace("±0.", "±."))
