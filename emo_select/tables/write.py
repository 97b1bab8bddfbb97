"""Write tables: CSV and TSV with four decimals, markdown, LaTeX (booktabs), aligned text, JSON."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emo_select.ownership import require_own_files
from emo_select.storage import write_output

Cell = str | int | float | None
SUFFIXES = {"csv": "csv", "tsv": "tsv", "markdown": "md", "latex": "tex", "text": "txt", "json": "json"}
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # spreadsheets run a text that begins so, unless it is quoted by '
MARKDOWN = re.compile(r"[\\|\[\]`]")  # what could close a cell or begin a link or code; `<` could begin markup
NAN = float("nan")  # an empty cell of a published table: blank in CSV, `nan` in markdown


@dataclass(frozen=True)
class Table:
    """A named table; `name` may hold slashes, for a file below a folder."""

    name: str
    columns: list[str]
    rows: list[list[Cell]]

    def records(self) -> list[dict[str, Cell]]:
        """Rows as objects, for JSON; an empty cell is null."""
        return [dict(zip(self.columns, map(_plain, row), strict=True)) for row in self.rows]


def render(table: Table, style: str) -> str:
    """A table as text in one of the styles of `SUFFIXES`, ending as the published files end."""
    if style == "csv":
        return _separated(table, ",")
    if style == "tsv":
        return _separated(table, "\t")
    if style == "json":
        import json

        return json.dumps(table.records(), indent=1, ensure_ascii=False) + "\n"
    return _aligned(table, {"markdown": "pipe", "latex": "latex_booktabs", "text": "simple"}[style])


def write_tables(tables: Sequence[Table], folder: Path, style: str) -> list[Path]:
    """Write each table to `folder/<name>.<suffix>` by rename; returns the files.

    Raises `OwnershipError`, before anything is written, where another's file stands.
    """
    files = [folder / f"{table.name}.{SUFFIXES[style]}" for table in tables]
    require_own_files(*files)
    for table, file in zip(tables, files, strict=True):
        write_output(file, render(table, style).encode())
    return files


def _separated(table: Table, delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(map(_four, table.columns))
    writer.writerows([_four(cell) for cell in row] for row in table.rows)
    return text.getvalue()


def _aligned(table: Table, style: str) -> str:
    from tabulate import tabulate

    table = _without_empty_columns(table) if style == "simple" else table
    text = [i for i in range(len(table.columns)) if any(isinstance(row[i], str) for row in table.rows)]
    rows = [[_one_line(cell, style) for cell in row] for row in table.rows]
    columns = [str(_one_line(name, style)) for name in table.columns]
    lines: str = tabulate(rows, columns, tablefmt=style, floatfmt=".4f", missingval="", disable_numparse=text)
    return lines + "\n"


def _without_empty_columns(table: Table) -> Table:
    kept = [i for i in range(len(table.columns)) if any(_plain(row[i]) not in (None, "") for row in table.rows)]
    return Table(table.name, [table.columns[i] for i in kept], [[row[i] for i in kept] for row in table.rows])


def _one_line(cell: Cell, style: str) -> Cell:
    if not isinstance(cell, str):
        return cell
    line = " ".join(cell.split())
    return MARKDOWN.sub(r"\\\g<0>", line).replace("<", "&lt;") if style == "pipe" else line


def _four(cell: Cell) -> Any:
    if isinstance(cell, float):
        return "" if math.isnan(cell) else f"{cell:.4f}"
    if isinstance(cell, str):
        return f"'{cell}" if cell.startswith(FORMULA) and not _is_plain(cell) else cell
    return "" if cell is None else cell


def _is_plain(cell: str) -> bool:
    """Whether a text that begins like a formula is a number, or a single sign."""
    return len(cell) == 1 or re.fullmatch(r"[+-]\d+(\.\d+)?(e[+-]?\d+)? ?%?", cell) is not None


def _plain(cell: Cell) -> Cell:
    return None if isinstance(cell, float) and math.isnan(cell) else cell
