"""`tasks`, `tasks check`, `fetch`: what can be evaluated, own tasks, and data for machines without network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emo_select.cli.common import AsJson, DataDir, emit, listed, writable
from emo_select.cli.common import models as with_revision

if TYPE_CHECKING:
    from emo_select.tasks import Task

SHOWN = 2  # prompts that `tasks check` prints
LAST_CHARACTERS = 1200  # of each; few-shot blocks can be long
COLUMNS = {"task": 0, "group": 0, "kind": 3, "shots": 0, "metric": 0, "train": 1, "test": 1, "data": 4, "here": 0}
"""What `tasks` lists, and what goes first where the terminal is narrow (see `columns.Column`)."""

app = typer.Typer(help="List the tasks, or check a task file of your own.", invoke_without_command=True)


def register(root: typer.Typer) -> None:
    """Add the commands of this module."""
    root.add_typer(app, name="tasks", rich_help_panel="Look around")
    root.command(rich_help_panel="Look around")(fetch)


@app.callback()
def list_all(
    context: typer.Context,
    group: Annotated[str | None, typer.Option("--group", "-g", help="Only this group.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks: sizes, shots, metric, data set, and whether the data is on this machine."""
    if context.invoked_subcommand:
        return None
    from emo_select.tasks import get_tasks, list_tasks

    rows = [_row(task) for task in (get_tasks([group], data_dir) if group else list_tasks(data_dir))]
    if as_json:
        return emit(rows)
    _print_columns(rows)
    return None


def _row(task: Task) -> dict[str, Any]:
    train, test = task.sizes or (None, None)
    return {
        "task": task.name, "group": task.group, "kind": task.kind, "shots": task.default_shots,
        "metric": task.headline_metric, "train": train, "test": test, "data": task.dataset,
        "here": task.available,
    }


def _print_columns(rows: Sequence[dict[str, Any]]) -> None:
    from emo_select.cli.columns import Column, show

    words = {"True": "yes", "False": "no", "None": "-"}
    show([Column(name, name in ("shots", "train", "test"), rank) for name, rank in COLUMNS.items()],
         [[words.get(str(row[key]), str(row[key])) for key in COLUMNS] for row in rows])


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A task file (YAML); docs/tasks.md explains its keys.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Also count tokens, with its tokenizer.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Check a task file and all its rows, and show two rendered prompts."""
    from emo_select.tasks import get_tasks

    (task,) = get_tasks([str(file)])
    for split in task.rule.present():
        docs = task.docs(split)
        typer.echo(f"{split}: {len(docs)} documents")
        for remark, positions in {**task.remarks(docs), **(_lengths(task, split, model) if model else {})}.items():
            some = ", ".join(str(position + 1) for position in positions[:5]) + (", …" if positions[5:] else "")
            typer.echo(f"  {remark.replace('_', ' ')}: {len(positions)} (number {some})")
    for number, example in enumerate(task.examples("test", limit=SHOWN), 1):
        typer.echo(f"\n--- prompt {number}, and the answer after the mark ▸")
        typer.echo(f"{example.prompt[-LAST_CHARACTERS:]}▸{example.answer}")


def _lengths(task: Task, split: str, model: str) -> dict[str, list[int]]:
    """Documents whose prompt and gold answer exceed the evaluation's context, or whose answer adds no token."""
    from emo_select.models import load_tokenizer
    from emo_select.spec import Evaluation

    limit, tokenizer = Evaluation().max_length, load_tokenizer(model)
    found: dict[str, list[int]] = {}
    for position, example in enumerate(task.examples(split)):
        prompt, whole = (len(tokenizer(text).input_ids) for text in (example.prompt, example.text))
        if whole > limit:
            found.setdefault(f"longer than {limit} tokens", []).append(position)
        if whole <= prompt:
            found.setdefault("answer without tokens", []).append(position)
    return found


def fetch(
    to: Annotated[Path, typer.Option("--to", callback=writable, help="Folder to fill; give it as --data-dir later.")],
    tasks: Annotated[list[str] | None, typer.Option("--task", "-t", help="Task or group (repeatable).")] = None,
    models: Annotated[list[str] | None, typer.Option("--model", "-m", help="Hub id of a model (repeatable).")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of the models; the same as ID@REVISION.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", hidden=True, help="Of no effect: nothing is asked.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be fetched, and stop.")] = False,
) -> None:
    """Download data sets and models into a folder, for machines without network. Run it again to go on."""
    from emo_select.tasks import fetch as fetching

    plan = fetching.make_plan(listed(tasks or []), with_revision(models or [], revision), to)
    for line in plan.summary():
        typer.echo(line)
    if dry_run:
        return
    fetching.carry_out(plan)
    if not plan.missing:
        return
    for line in plan.how_to_use():
        typer.echo(line)
