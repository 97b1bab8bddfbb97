"""Tables for people: in a pipe as wide as they are, on a terminal no wider than it, and never with a cell cut.

Where a terminal is too narrow, columns that can be missed are left out and named; what is still too long wraps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from emo_select import progress

if TYPE_CHECKING:
    from emo_select.tables import Table as Results

GAP = 2
NARROW = 12  # columns up to this width do not wrap; wider ones make room for them


@dataclass(frozen=True)
class Column:
    """A column. Where there is no room, those with the highest `rank` go first; rank 0 never goes."""

    name: str
    right: bool = False
    rank: int = 0


def show(columns: Sequence[Column], rows: Iterable[Sequence[str | Text]], *, title: str | None = None,
         talk: bool = False) -> None:
    """Print a table to stdout, or as talk to stderr."""
    console = progress.console() if talk else Console(file=sys.stdout)
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    width = console.width if console.is_terminal else None
    kept = fitting(columns, cells, width)
    table = build([columns[number] for number in kept], [[row[number] for number in kept] for row in cells], title)
    if width is None:
        console = Console(file=console.file, width=max(_natural(columns, cells, kept), len(title or "")))
    if not (talk and progress.is_quiet()):
        console.print(table)
    missing = [column.name for number, column in enumerate(columns) if number not in kept]
    if missing:
        progress.say(f"Left out at {width} columns: {', '.join(missing)}.")


def build(columns: Sequence[Column], rows: Sequence[Sequence[Text]], title: str | None = None) -> Table:
    """The table; cells that are too long wrap."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold",
                  padding=(0, GAP, 0, 0))
    for number, column in enumerate(columns):
        narrow = max([len(column.name), *(len(row[number]) for row in rows)]) <= NARROW
        table.add_column(column.name, justify="right" if column.right else "left", overflow="fold", no_wrap=narrow)
    for row in rows:
        table.add_row(*row)
    return table


def fitting(columns: Sequence[Column], rows: Sequence[Sequence[Text]], width: int | None) -> list[int]:
    """Numbers of the columns that fit side by side into `width`; None is endless."""
    kept = list(range(len(columns)))
    for number in sorted((n for n in kept if columns[n].rank), key=lambda n: (-columns[n].rank, -n)):
        if width is None or _natural(columns, rows, kept) <= width:
            break
        kept.remove(number)
    return kept


def _natural(columns: Sequence[Column], rows: Sequence[Sequence[Text]], kept: Sequence[int]) -> int:
    return sum(max([len(columns[number].name), *(len(row[number]) for row in rows)]) + GAP for number in kept)


MISSED_FIRST, MISSED_LAST = ("memory GB", "disk GB", "time", "seeds", "tasks"), ("n", "documents", "group", "setting")
"""Columns of result tables in the order in which they make room; between them those that say one thing in all rows."""


def show_results(tables: Sequence[Results], *, headings: bool = False) -> None:
    """Print result tables as text; on a terminal without the columns that it has no room for, which are named."""
    from emo_select.tables import render

    console = Console(file=sys.stdout)
    for number, table in enumerate(tables):
        kept = _narrowed(table, console.width if console.is_terminal else None)
        heading = f"{table.name}\n\n" if headings else ""
        sys.stdout.write(heading + render(kept, "text") + ("" if number == len(tables) - 1 else "\n"))
        missing = [name for name in table.columns if name not in kept.columns]
        if missing:
            progress.say(f"Left out at {console.width} columns: {', '.join(missing)} (--json, --to or a pipe has all).")


def _narrowed(table: Results, width: int | None) -> Results:
    from emo_select.tables import render

    same = [name for at, name in enumerate(table.columns[2:], 2) if len({row[at] for row in table.rows}) == 1]
    for name in (*MISSED_FIRST, *(name for name in ("setting", "group") if name in same), *MISSED_LAST):
        if width is None or max(map(len, render(table, "text").splitlines()), default=0) <= width:
            break
        if name in table.columns:
            at = table.columns.index(name)
            table = replace(table, columns=table.columns[:at] + table.columns[at + 1:],
                            rows=[row[:at] + row[at + 1:] for row in table.rows])
    return table
