"""Nothing is cut: not in help, not in tables, whether on a terminal of 80 columns or in a pipe."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from emo_select.cli.app import app
from emo_select.cli.columns import Column, _narrowed, build, fitting
from emo_select.tables import Table

PROGRAM = Path(sys.executable).with_name("emo-select")


def every_command(command, path=()):
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from every_command(child, (*path, name))


COMMANDS = list(every_command(typer.main.get_command(app)))


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=lambda value: " ".join(value) if isinstance(value, tuple)
                         else "")
@pytest.mark.parametrize("columns", [80, 40])
def test_help_names_every_option_whole_and_keeps_to_the_width(path, command, columns):
    shown = CliRunner().invoke(app, [*path, "--help"], terminal_width=columns).stdout
    words = set(re.findall(r"[\w-]+", shown))
    for parameter in (one for one in command.params if not getattr(one, "hidden", False)):
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert parameter.param_type_name == "argument" or name in words, name
    for name in getattr(command, "commands", {}):
        assert name in words
    assert "…" not in shown.replace(", …", "")
    if columns == 80:
        assert max(map(len, shown.splitlines())) <= 80


def on_a_terminal(*words, columns):
    """What a program writes to a terminal of this width."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "dumb"}
    with subprocess.Popen([PROGRAM, *words], stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        said = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:
                break
            if not part:
                break
            said += part
    os.close(leader)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", said.decode()).replace("\r", "")


def test_the_list_of_tasks_fits_a_terminal_and_is_whole_in_a_pipe():
    shown = on_a_terminal("tasks", columns=80)
    table = [line for line in shown.splitlines() if not line.startswith("Left out")]
    assert max(map(len, table)) <= 80
    assert "gsm8k_generation_8shot_merged" in shown and "mmlu_merged_computer_science" in shown
    assert re.search(r"Left out at 80 columns: .*data", shown)
    piped = subprocess.run([PROGRAM, "tasks"], capture_output=True, text=True, check=True, env={**os.environ,
                           "COLUMNS": "40"}).stdout
    assert "mandarjoshi/trivia_qa/rc.wikipedia.nocontext" in piped and "multiple_choice" in piped


def test_columns_go_by_rank_and_cells_wrap():
    columns = [Column("task"), Column("kind", rank=2), Column("metric", rank=1)]
    rows = [[Text("x" * 30), Text("y" * 10), Text("z" * 10)]]
    assert fitting(columns, rows, None) == [0, 1, 2]
    assert fitting(columns, rows, 60) == [0, 1, 2]
    assert fitting(columns, rows, 50) == [0, 2]
    assert fitting(columns, rows, 20) == [0]
    assert build(columns, rows).columns[0].overflow == "fold"


def test_result_tables_make_room_and_say_so():
    columns = ["model", "keep-k", "setting", "metric", "n", "before", "± before", "memory GB"]
    rows = [["m" * 20, keep_k, "batch 64", "acc_raw", 160, 0.5, 0.01, 1.0] for keep_k in (4, 8)]
    table = Table("summary", columns, rows)
    assert _narrowed(table, None).columns == columns
    assert _narrowed(table, 80).columns == [name for name in columns if name != "memory GB"]
    assert _narrowed(table, 70).columns == [name for name in columns if name not in ("memory GB", "setting")]
    assert _narrowed(table, 10).columns == ["model", "keep-k", "metric", "before", "± before"]
