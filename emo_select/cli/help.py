"""How `--help` looks: options by panel, in plain columns that wrap, so that no name is cut, whatever the width."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer.core

COMMANDS, OPTIONS = "Commands", "Options"


class Command(typer.core.TyperCommand):
    """A command whose options are listed by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of arguments and options."""
        _write_options(self.get_params(ctx), ctx, formatter)


class Group(typer.core.TyperGroup):
    """A group whose commands and options are listed by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of options, then those of commands."""
        _write_options(self.get_params(ctx), ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write what each command is for, whole."""
        found = [(name, command) for name in self.list_commands(ctx)
                 if (command := self.get_command(ctx, name)) is not None and not command.hidden]
        _write(formatter, ((getattr(command, "rich_help_panel", None) or COMMANDS,
                            (name, command.get_short_help_str(limit=1000))) for name, command in found))


def _write_options(parameters: Iterable[Any], ctx: Any, formatter: Any) -> None:
    rows = []
    for parameter in parameters:
        line = parameter.get_help_record(ctx)
        if line is not None:
            is_argument = parameter.param_type_name == "argument"
            panel = getattr(parameter, "rich_help_panel", None)
            rows.append((panel or ("Arguments" if is_argument else OPTIONS), line))
    _write(formatter, rows)


def _write(formatter: Any, rows: Iterable[tuple[str, tuple[str, str]]]) -> None:
    sections: dict[str, list[tuple[str, str]]] = {}
    for panel, line in rows:
        sections.setdefault(panel, []).append(line)
    general = sections.pop(OPTIONS, None)
    for title, lines in [*sections.items(), *([(OPTIONS, general)] if general else [])]:
        with formatter.section(title):
            formatter.write_dl(lines)
