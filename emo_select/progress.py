"""Progress on stderr: a rich bar on a terminal, a line now and then elsewhere, nothing when quiet.

Library code opens a bar with `track`; only the command line decides, through `configure`, what is shown.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 15.0  # without a terminal, at most one line in this many seconds


@dataclass
class _State:
    quiet: bool = False
    rows: Progress | None = None
    said: set[str] = field(default_factory=set)
    console: Console = field(default_factory=lambda: Console(stderr=True))


_state = _State()


def configure(*, quiet: bool = False) -> None:
    """Choose what progress shows; called once by the command line."""
    _state.quiet = quiet


def console() -> Console:
    """The console that talk goes to (stderr); data goes to stdout."""
    return _state.console


def interactive() -> bool:
    """Whether somebody watches: stderr is a terminal and not to be quiet."""
    return not _state.quiet and _state.console.is_terminal


def is_quiet() -> bool:
    """Whether nothing is to be said."""
    return _state.quiet


def say(message: str) -> None:
    """Print one line of talk to stderr, unless quiet. `message` is plain text, never markup."""
    if not _state.quiet:
        _state.console.print(message, markup=False, highlight=False, soft_wrap=True)


def complain(message: str) -> None:
    """Print an error to stderr, whether quiet or not: errors are never hidden."""
    _state.console.print(message, style="bold red", markup=False, highlight=False, soft_wrap=True)


def say_once(message: str) -> None:
    """`say`, unless this process has said the same before."""
    if message not in _state.said:
        _state.said.add(message)
        say(message)


def talk(renderable: RenderableType) -> None:
    """Print a table or other rich object to stderr, unless quiet."""
    if not _state.quiet:
        _state.console.print(renderable)


class Bar:
    """One row of progress. `advance` may be called as often as convenient."""

    def __init__(self, description: str, total: float | None, rows: Progress | None, task: TaskID | None) -> None:
        self.description, self.total, self.done = description, total, 0.0
        self._rows, self._task = rows, task
        self._started = self._printed = time.monotonic()

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Add `amount` units; `note` replaces the text to the right of the bar (loss, tokens/s, …)."""
        self.done += amount
        self.update(note)

    def update(self, note: str | None = None, *, total: float | None = None) -> None:
        """Change the note or the total without adding units."""
        self.total = total if total is not None else self.total
        if self._rows is not None and self._task is not None:
            extra: dict[str, Any] = {} if note is None else {"note": note}
            self._rows.update(self._task, completed=self.done, total=self.total, **extra)
        elif not _state.quiet and time.monotonic() - self._printed > LINE_EVERY_S:
            self._print_line(note or "")

    def _print_line(self, note: str) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self._started
        left = elapsed * (self.total - self.done) / self.done if self.total and self.done else None
        of = f"/{self.total:g}" if self.total else ""
        estimate = f", {left:.0f} s left" if left is not None else ""
        say(f"{self.description}: {self.done:g}{of}{estimate} {note}".rstrip())


@contextmanager
def track(description: str, total: float | None = None) -> Iterator[Bar]:
    """Show progress for the body: `with track("Selecting experts", total=layers) as bar: bar.advance()`."""
    if not interactive():
        yield Bar(description, total, None, None)
        return
    with _rows() as rows:
        task = rows.add_task(description, total=total, note="")
        yield Bar(description, total, rows, task)
        rows.remove_task(task)


@contextmanager
def _rows() -> Iterator[Progress]:
    """The display, which bars that are open at the same time share."""
    if _state.rows is not None:
        yield _state.rows
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False))
    with Progress(*columns, console=_state.console, transient=True) as rows:
        _state.rows = rows
        try:
            yield rows
        finally:
            _state.rows = None
