"""`table`, `plot`, `report`, `compare`: everything that reads a finished tree."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emo_select import progress
from emo_select.cli.common import OUTPUT, AsJson, OutputDir, emit, writable, writable_file

if TYPE_CHECKING:
    from emo_select.tables import Filters, Layout, Problem, Records, Table
    from emo_select.tables.paper import PaperSource

FILTER = "Filters"
PROBLEMS_SHOWN = 20


class Kind(StrEnum):
    """Which table."""

    summary = "summary"
    methods = "methods"
    main = "main"
    calibration = "calibration"
    results = "results"
    paper = "paper"


class Style(StrEnum):
    """How tables are written."""

    text = "text"
    csv = "csv"
    tsv = "tsv"
    markdown = "markdown"
    latex = "latex"


class Rows(StrEnum):
    """Which rows the main and calibration tables have."""

    auto = "auto"
    published = "published"
    found = "found"


class Checkpoint(StrEnum):
    """Which checkpoint of a run the main and calibration tables read."""

    last = "last"
    first = "first"
    both = "both"


class Stage(StrEnum):
    """Which checkpoint plots show."""

    before = "before"
    after = "after"


class PlotFormat(StrEnum):
    """File formats of figures."""

    pdf = "pdf"
    svg = "svg"
    png = "png"


ModelFilter = Annotated[list[str] | None, typer.Option("--model", "-m", help="Only this model (repeatable).",
                                                       rich_help_panel=FILTER)]
TaskFilter = Annotated[list[str] | None, typer.Option("--task", "-t", help="Only this task.", rich_help_panel=FILTER)]
GroupFilter = Annotated[list[str] | None, typer.Option("--group", "-g", help="Only this group of tasks.",
                                                       rich_help_panel=FILTER)]
MethodFilter = Annotated[list[str] | None, typer.Option("--method", help="Only this method.", rich_help_panel=FILTER)]
KeepKFilter = Annotated[list[int] | None, typer.Option("--keep-k", "-k", help="Only this keep-k.",
                                                       rich_help_panel=FILTER)]
Labels = Annotated[Path | None, typer.Option("--labels", help="YAML with names, order and groups; see docs/tables.md.",
                                             rich_help_panel=OUTPUT)]
Cached = Annotated[bool, typer.Option("--cache/--no-cache", help="Reuse what unchanged files held last time.",
                                      rich_help_panel=OUTPUT)]
TablesFolder = Annotated[Path | None, typer.Option(
    "--tables", help="For the paper's tables and figures: a folder with prune_eval_tables_final and so on, not a tree.",
    rich_help_panel=FILTER)]
PublishedWins = Annotated[bool, typer.Option(
    "--published-wins", help="Count wins as the published script does, which ignores a baseline that is missing.",
    rich_help_panel=FILTER)]


def table(
    kind: Annotated[Kind, typer.Argument(help="summary: averages, drops, sizes; methods: side by side, before and "
                                              "after; main: the published per-metric tables; calibration: by number "
                                              "of examples; results: models side by side with win counts; "
                                              "paper: the paper's own tables.")] = Kind.summary,
    output_dir: OutputDir = None,
    models: ModelFilter = None,
    tasks: TaskFilter = None,
    groups: GroupFilter = None,
    methods: MethodFilter = None,
    keep_ks: KeepKFilter = None,
    metrics: Annotated[list[str] | None, typer.Option("--metric", help="Metric (repeatable for main); else those that "
                                                                       "the paper reports.")] = None,
    checkpoint: Annotated[Checkpoint, typer.Option("--checkpoint", help="For main and calibration: last is after "
                                                                        "finetuning, first before.")] = Checkpoint.last,
    rows: Annotated[Rows, typer.Option("--rows", help="For main and calibration: the published rows, those found, or "
                                                      "published where the tree has such models.")] = Rows.auto,
    style: Annotated[Style, typer.Option("--format", help="How to write it.", rich_help_panel=OUTPUT)] = Style.text,
    to: Annotated[Path | None, typer.Option("--to", callback=writable,
                                            help="Write files into this folder instead of stdout.",
                                            rich_help_panel=OUTPUT)] = None,
    folder: TablesFolder = None,
    published_wins: PublishedWins = False,
    labels: Labels = None,
    as_json: AsJson = False,
    cached: Cached = True,
) -> None:
    """Show what a tree of runs measured; name every file that could not be used."""
    from emo_select import tables

    if kind is Kind.paper:
        from emo_select.tables.paper import paper_tables

        source = _paper_source(folder, output_dir, cached, models, tasks, groups, methods, keep_ks)
        _show(*paper_tables(source, published_wins=published_wins), style.value, to, as_json)
        return
    records, layout, filters = _read(output_dir, labels, cached, models, tasks, groups, methods, keep_ks)
    made, problems = tables.make(
        kind.value, records, layout, filters=filters, metrics=metrics or [], rows=rows.value,
        checkpoints=[name for name in tables.CHECKPOINTS if checkpoint in (name, Checkpoint.both)],
    )
    _show(made, problems, style.value, to, as_json)


def plot(
    kinds: Annotated[list[str] | None, typer.Argument(help="keep-k, methods, calibration, drops, pareto; with --paper "
                                                           "figure3, 4, 11, 12, 13; else all that have data.",
                                                      show_default=False)] = None,
    output_dir: OutputDir = None,
    models: ModelFilter = None,
    tasks: TaskFilter = None,
    groups: GroupFilter = None,
    methods: MethodFilter = None,
    keep_ks: KeepKFilter = None,
    stage: Annotated[Stage | None, typer.Option("--stage", help="before or after finetuning; else after where "
                                                                "anything was finetuned.")] = None,
    formats: Annotated[list[PlotFormat] | None, typer.Option("--format", help="Repeatable; else pdf and png.",
                                                             rich_help_panel=OUTPUT)] = None,
    to: Annotated[Path, typer.Option("--to", callback=writable,
                                     help="Folder to write into.", rich_help_panel=OUTPUT)] = Path("plots"),
    paper: Annotated[bool, typer.Option("--paper", help="Figures 3, 4, 11, 12, 13 in the paper's colours.")] = False,
    folder: TablesFolder = None,
    published_wins: PublishedWins = False,
    labels: Labels = None,
    cached: Cached = True,
) -> None:
    """Draw accuracy against keep-k, methods, calibration size, drops per task, size against accuracy."""
    suffixes = [one.value for one in formats] if formats else ["pdf", "png"]
    if paper:
        from emo_select.tables.paper_plots import paper_plots

        source = _paper_source(folder, output_dir, cached, models, tasks, groups, methods, keep_ks)
        _list(*paper_plots(source, to, kinds=kinds or (), formats=suffixes, published_wins=published_wins))
        return
    from emo_select.tables.plots import plot as draw

    records, layout, filters = _read(output_dir, labels, cached, models, tasks, groups, methods, keep_ks)
    files, problems = draw(filters.apply(records, layout), layout, to, kinds=kinds or (),
                           stage=stage.value if stage else None, formats=suffixes)
    _list(files, [*records.problems, *problems])


def report(
    file: Annotated[Path, typer.Argument(callback=writable_file, help="The HTML file to write.")] = (
        Path("report.html")),
    output_dir: OutputDir = None,
    models: ModelFilter = None,
    tasks: TaskFilter = None,
    groups: GroupFilter = None,
    methods: MethodFilter = None,
    keep_ks: KeepKFilter = None,
    title: Annotated[str, typer.Option("--title", help="Heading of the page.")] = "Expert selection: results",
    examples: Annotated[int, typer.Option("--examples", min=0, help="Changed predictions shown per run.")] = 5,
    labels: Labels = None,
    cached: Cached = True,
) -> None:
    """Write one self-contained HTML page about a tree: tables, plots, every run; opens from disk without network."""
    from emo_select.tables.report import write_report

    records, layout, filters = _read(output_dir, labels, cached, models, tasks, groups, methods, keep_ks)
    write_report(filters.apply(records, layout), layout, file, title=title, examples=examples)
    _complain(records.problems)
    typer.echo(file)


def compare(
    a: Annotated[str, typer.Argument(help="A run directory, a tree, or a model of the tree.")],
    b: Annotated[str, typer.Argument(help="The other one, of the same kind.")],
    output_dir: OutputDir = None,
    metric: Annotated[str | None, typer.Option("--metric", help="Per-document metric, else each task's primary "
                                                                "one.")] = None,
    before: Annotated[bool, typer.Option("--before", help="Compare before finetuning, not after.")] = False,
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Bootstrap samples.")] = 2000,
    confidence: Annotated[float, typer.Option("--confidence", min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    flips: Annotated[int, typer.Option("--flips", min=0, help="Documents to list that score differently.")] = 10,
    style: Annotated[Style, typer.Option("--format", help="How to write it.", rich_help_panel=OUTPUT)] = Style.text,
    to: Annotated[Path | None, typer.Option("--to", callback=writable,
                                            help="Write files into this folder, with all flips.",
                                            rich_help_panel=OUTPUT)] = None,
    labels: Labels = None,
    as_json: AsJson = False,
) -> None:
    """Compare two runs, models or trees document by document: intervals, flips, overlap of the kept experts."""
    from dataclasses import replace

    from emo_select.tables import load_layout
    from emo_select.tables.compare import Options, comparison_tables, flips_table
    from emo_select.tables.compare import compare as compared

    options = Options("first" if before else "last", metric, resamples, confidence)
    layout = load_layout(labels)
    found, problems = compared(a, b, output_dir, options, layout)
    listed = flips_table(found)
    if to is None and not as_json:
        listed = replace(listed, rows=listed.rows[:flips])
    made = [*comparison_tables(found, layout, options), *([listed] if listed.rows else [])]
    _show(made, problems, style.value, to, as_json)


def _read(
    output_dir: str | None, labels: Path | None, cached: bool, models: list[str] | None, tasks: list[str] | None,
    groups: list[str] | None, methods: list[str] | None, keep_ks: list[int] | None,
) -> tuple[Records, Layout, Filters]:
    from emo_select.tables import Filters, load_layout, load_tree

    layout = load_layout(labels)
    filters = Filters(tuple(models or ()), tuple(tasks or ()), tuple(groups or ()), tuple(methods or ()),
                      tuple(keep_ks or ()))
    return load_tree(output_dir, cached=cached), layout, filters


def _paper_source(folder: Path | None, output_dir: str | None, cached: bool, *filters: Any) -> PaperSource:
    from emo_select.tables.paper import from_files, from_records

    if folder is not None:
        return from_files(folder)
    records, _, chosen = _read(output_dir, None, cached, *filters)
    return from_records(records, chosen)


def _list(files: Sequence[Path], problems: Sequence[Problem]) -> None:
    _complain(problems)
    for file in files:
        typer.echo(file)


def _show(made: Sequence[Table], problems: Sequence[Problem], style: str, to: Path | None, as_json: bool) -> None:
    from emo_select.cli.columns import show_results
    from emo_select.tables import problems_table, render, write_tables

    listed = problems_table(problems)
    if as_json:
        emit({"tables": [{"name": t.name, "rows": t.records()} for t in made], "problems": listed.records()})
        return
    if to is not None:
        files = write_tables([*made, listed], to, style)
        progress.say(f"Wrote {len(files)} files below {to}.")
    elif style == "text":
        show_results(made, headings=len(made) > 1)
    else:
        for one in made:
            heading = f"{one.name}\n\n" if len(made) > 1 else ""
            typer.echo(heading + render(one, style))
    _complain(problems)


def _complain(problems: Sequence[Problem]) -> None:
    """The first problems on stderr, one line each."""
    if problems:
        progress.say(f"Problems ({len(problems)}):")
    for problem in problems[:PROBLEMS_SHOWN]:
        progress.say(f"  {problem.kind}: {problem.path}: {problem.message}")
    if len(problems) > PROBLEMS_SHOWN:
        progress.say(f"  … and {len(problems) - PROBLEMS_SHOWN} more; --to DIR writes all of them to problems.*.")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (table, plot, report, compare):
        app.command(rich_help_panel="Results")(command)
