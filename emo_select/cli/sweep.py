"""`sweep`: a file of many runs, planned, carried out on Slurm or here, watched, resumed, taken back, reported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from emo_select.cli import common, completion
from emo_select.cli.common import MACHINE, OUTPUT, RUN

if TYPE_CHECKING:
    from emo_select.sweeps.control import Control

SITE = "Slurm"
Executor = Literal["slurm", "local"]
Keep = Literal["none", "last", "all"]
File = Annotated[str, typer.Argument(metavar="SWEEP", autocompletion=completion.sweeps,
                                      help="A sweep file, or the name of a shipped sweep or of one of this tree.")]
ExecutorOption = Annotated[Executor | None, typer.Option("--executor", show_default="slurm", rich_help_panel=MACHINE,
                                                         help="slurm, or local: workers on this machine.")]
ProfileName = Annotated[str | None, typer.Option("--profile", "-p", rich_help_panel=MACHINE,
                                                 help="A profile of the profiles file.")]
Profiles = Annotated[Path | None, typer.Option(
    "--profiles", envvar="EMO_SELECT_PROFILES", show_default="~/.config/emo-select/profiles.yaml",
    rich_help_panel=MACHINE, help="YAML that describes sites.")]
Workers = Annotated[int | None, typer.Option("--workers", "-j", min=1, show_default="1", rich_help_panel=MACHINE,
                                             help="Units at the same time (local).")]
Gpus = Annotated[int | None, typer.Option("--gpus", min=0, show_default="0", rich_help_panel=MACHINE,
                                          help="GPUs of one unit.")]
Partition = Annotated[str | None, typer.Option("--partition", rich_help_panel=SITE, help="Where to run.")]
Account = Annotated[str | None, typer.Option("--account", rich_help_panel=SITE, help="Who pays.")]
Qos = Annotated[str | None, typer.Option("--qos", rich_help_panel=SITE, help="Quality of service.")]
Constraint = Annotated[str | None, typer.Option("--constraint", rich_help_panel=SITE, help="Features of a node.")]
Time = Annotated[str | None, typer.Option("--time", show_default="12:00:00", rich_help_panel=SITE,
                                          help="Limit of one job; a job that reaches it is requeued and goes on.")]
Cpus = Annotated[int | None, typer.Option("--cpus", min=1, show_default="2", rich_help_panel=SITE,
                                          help="Processors of one unit.")]
Memory = Annotated[str | None, typer.Option("--memory", rich_help_panel=SITE, help="Host memory, such as 64GB.")]
MaxParallel = Annotated[int | None, typer.Option("--max-parallel", min=1, rich_help_panel=SITE,
                                                 help="Units at the same time, over all arrays.")]
Extra = Annotated[list[str] | None, typer.Option("--sbatch", metavar="KEY=VALUE", rich_help_panel=SITE,
                                                 help="A further sbatch parameter (repeatable).")]
KeepWeights = Annotated[Keep | None, typer.Option(
    "--keep-weights", show_default="all", rich_help_panel=OUTPUT,
    help="Weights that stay after evaluation: none, the last checkpoint, or all.")]
Wait = Annotated[bool, typer.Option("--wait", "-w", help="Watch until everything has ended.", rich_help_panel=OUTPUT)]
Again = Annotated[bool, typer.Option("--set-aside", help="Also units that failed twice.", rich_help_panel=RUN)]

app = typer.Typer(help="Many runs from a file: on Slurm or on this machine, nothing computed twice.",
                  no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add the commands of this module."""
    root.add_typer(app, name="sweep", rich_help_panel="The whole path")


@app.command()
def plan(
    sweep: File,
    keep_weights: KeepWeights = None,
    tokens_per_second: Annotated[float | None, typer.Option(
        min=1e-9, show_default="as measured in this tree", rich_help_panel=MACHINE,
        help="Speed of one GPU, for the hours.")] = None,
    max_parallel: MaxParallel = None,
    data_dir: common.DataDir = None,
    output_dir: common.OutputDir = None,
    as_json: common.AsJson = False,
) -> None:
    """Show the runs, what is done, what is shared, and what the rest will cost. Starts and downloads nothing."""
    from emo_select.cli import sweep_views

    options = {"max_parallel": max_parallel}
    control = _control(sweep, output_dir, keep_weights, data_dir, profile=None, profiles=None, options=options)
    found = sweep_views.plan_data(control, tokens_per_second)
    if as_json:
        common.emit(found)
    else:
        sweep_views.show_plan(found)


@app.command()
def submit(
    sweep: File,
    executor: ExecutorOption = None,
    profile: ProfileName = None,
    profiles: Profiles = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    time: Time = None,
    gpus: Gpus = None,
    cpus: Cpus = None,
    memory: Memory = None,
    max_parallel: MaxParallel = None,
    sbatch: Extra = None,
    workers: Workers = None,
    keep_weights: KeepWeights = None,
    data_dir: common.DataDir = None,
    output_dir: common.OutputDir = None,
    wait: Wait = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", rich_help_panel=OUTPUT,
                                          help="Print the batch scripts, and stop.")] = False,
) -> None:
    """Hand in everything that is not done and not in the queue yet. With the local executor: do it now."""
    options = {"executor": executor, "partition": partition, "account": account, "qos": qos, "constraint": constraint,
               "time": time, "gpus": gpus, "cpus": cpus, "memory": memory, "max_parallel": max_parallel,
               "workers": workers, "extra": _pairs(sbatch)}
    control = _control(sweep, output_dir, keep_weights, data_dir, profile, profiles, options)
    if dry_run:
        return _print_scripts(control)
    return _submit(control, wait=wait, again=False)


@app.command()
def resume(
    sweep: File,
    executor: ExecutorOption = None,
    profile: ProfileName = None,
    profiles: Profiles = None,
    time: Time = None,
    gpus: Gpus = None,
    memory: Memory = None,
    max_parallel: MaxParallel = None,
    workers: Workers = None,
    again: Again = False,
    output_dir: common.OutputDir = None,
    wait: Wait = False,
) -> None:
    """Hand in again what is missing, failed, lost or stale, with the options of the last submission."""
    options = {"executor": executor, "time": time, "gpus": gpus, "memory": memory, "max_parallel": max_parallel,
               "workers": workers}
    control = _control(sweep, output_dir, None, None, profile, profiles, options)
    _submit(control, wait=wait, again=again)


@app.command()
def status(
    sweep: File,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep looking until everything has ended.",
                                        rich_help_panel=OUTPUT)] = False,
    every: Annotated[float, typer.Option(min=1, help="Seconds between looks.", rich_help_panel=OUTPUT)] = 10,
    output_dir: common.OutputDir = None,
    as_json: common.AsJson = False,
) -> None:
    """Show how many units are in which state, which failed and why, where their logs are, and the time left."""
    from emo_select.cli import sweep_views

    control = _control(sweep, output_dir)
    standings = sweep_views.follow(control, every) if watch else control.watch.look()
    if as_json:
        common.emit(sweep_views.status_data(control, standings))
    else:
        sweep_views.show_status(control, standings)


@app.command()
def cancel(sweep: File, output_dir: common.OutputDir = None) -> None:
    """Take back what a sweep has in Slurm's queue, or stop it where it runs here. `resume` goes on from there."""
    from emo_select import progress

    count = _control(sweep, output_dir).cancel()
    progress.say(f"{_units(count)} taken back from Slurm; what is finished stays, `emo-select sweep resume` goes on.")


@app.command()
def logs(
    sweep: File,
    run: Annotated[str, typer.Argument(help="A run's directory, or a part of it that no other run has.")],
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Of the end.", rich_help_panel=OUTPUT)] = 200,
    output_dir: common.OutputDir = None,
) -> None:
    """Print the end of the log of a run's last attempt."""
    from emo_select.cli import sweep_views

    sweep_views.print_log(_control(sweep, output_dir), run, lines)


@app.command()
def report(
    sweep: File,
    slowest: Annotated[int, typer.Option(min=0, help="How many of the slowest to show.", rich_help_panel=OUTPUT)] = 5,
    output_dir: common.OutputDir = None,
    as_json: common.AsJson = False,
) -> None:
    """Sum up what a sweep has cost so far: time, tokens, memory, repeats; and the slowest units."""
    from emo_select.cli import sweep_views
    from emo_select.sweeps.report import summary

    control = _control(sweep, output_dir)
    found = summary(control.paths, control.units, slowest)
    if as_json:
        common.emit(found)
    else:
        sweep_views.show_report(found)


def _control(sweep: str, output_dir: str | None, keep_weights: Keep | None = None, data_dir: str | None = None,
             profile: str | None = None, profiles: Path | None = None,
             options: dict[str, Any] | None = None) -> Control:
    """The sweep of a file (with what was said at its last submission, if any) or of a name."""
    from emo_select.sweeps import store
    from emo_select.sweeps.control import Control
    from emo_select.sweeps.profile import load_profile
    from emo_select.sweeps.spec import read_sweep, sweep_file
    from emo_select.tree import Tree

    tree = Tree.at(output_dir)
    submitted = not sweep.endswith((".yaml", ".yml")) and tree.sweep(sweep).record.exists()
    file = None if submitted else sweep_file(sweep)
    spec = store.load_submission(tree, sweep).sweep if file is None else read_sweep(file)
    before = store.load_submission(tree, spec.name) if tree.sweep(spec.name).record.exists() else None
    if data_dir is not None:
        spec = spec.model_copy(update={"execution": {**spec.execution, "data_dir": data_dir}})
    elif before is not None and "data_dir" in before.sweep.execution:
        spec = spec.model_copy(update={"execution": {"data_dir": before.sweep.execution["data_dir"], **spec.execution}})
    last = before.profile.model_dump() if before is not None and profile is None else {}
    chosen = load_profile(profile, profiles, {**last, **_given(options or {})})
    keep = keep_weights or (before.keep_weights if before is not None else "all")
    return Control(tree, store.Submission(sweep=spec, keep_weights=keep, profile=chosen))


def _units(count: int) -> str:
    return f"{count} unit{'s' * (count != 1)}"


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value not in (None, {})}


def _pairs(values: list[str] | None) -> dict[str, str | bool]:
    parts = (value.lstrip("-").partition("=") for value in values or ())
    return {key: value if equals else True for key, equals, value in parts}


def _print_scripts(control: Control) -> None:
    from emo_select.sweeps import slurm

    standings = control.watch.look()
    for script in slurm.scripts(control.paths, control.blocks(control.chosen(standings), standings),
                                control.submission.profile):
        typer.echo(script)


def _submit(control: Control, *, wait: bool, again: bool) -> None:
    from emo_select import progress
    from emo_select.cli import sweep_views

    local = control.submission.profile.executor == "local"
    with sweep_views.counting(control, local=local) as (began, changed):
        done = control.submit(again=again, began=began, changed=changed)
    if not done:
        progress.say("Nothing to hand in: everything is done, in the queue or set aside.")
    elif not local:
        progress.say(f"{_units(len(done))} handed to Slurm; `emo-select sweep status {control.submission.sweep.name}` "
                     "shows how they fare.")
    if wait and not local:
        sweep_views.follow(control)
    if wait or local:
        _finish(control)


def _finish(control: Control) -> None:
    """Show how it ended, then the table; exit code 1 unless everything is done."""
    from emo_select.cli import sweep_views

    standings = control.watch.look()
    sweep_views.show_status(control, standings)
    sweep_views.show_table(control)
    if any(standing.state.value != "done" for standing in standings):
        raise typer.Exit(1)
