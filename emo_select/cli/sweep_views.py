"""How a sweep's plan, states, logs and costs are shown."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from emo_select import progress
from emo_select.cli.columns import Column, build, show, show_results
from emo_select.errors import EmoSelectError
from emo_select.sweeps import estimate, states
from emo_select.sweeps.bench import pending
from emo_select.sweeps.control import Control, find
from emo_select.sweeps.graph import KINDS, Unit
from emo_select.sweeps.states import ALIVE, Standing, State

SHOWN = 12  # failures listed before "and N more"
STYLES = {State.DONE: "green", State.RUNNING: "bold cyan", State.FAILED: "bold red", State.SET_ASIDE: "bold red",
          State.LOST: "yellow", State.STALE: "yellow", State.BLOCKED: "yellow", State.HELD: "yellow"}
TROUBLE = (State.FAILED, State.SET_ASIDE, State.LOST, State.STALE, State.BLOCKED, State.HELD)


def plan_data(control: Control, tokens_per_second: float | None) -> dict[str, Any]:
    """A plan as plain data: runs, units, costs left with and without sharing, disk, hours."""
    bench, estimator = control.bench, estimate.Estimator(control.bench)
    left = [run for unit in control.units if unit.kind == "run" for run in bench.left(unit)]
    shared, alone = estimator.shared(control.units), estimator.alone(left)
    given = tokens_per_second
    rates = estimate.Rates(given, given, given) if given else estimator.rates(control.runs)
    profile, keep = control.submission.profile, control.submission.keep_weights
    todo = pending(bench, control.units).values()
    return {
        "sweep": control.submission.sweep.name,
        "runs": {"all": len(control.runs), "done": len(control.runs) - len(left), "to_do": len(left)},
        "reasons": dict(Counter(_reason(control, run) for run in left).most_common()),
        "units": {kind: _unit_counts(control.units, todo, kind) for kind in KINDS},
        "cost": shared.as_data(),
        "cost_without_sharing": alone.as_data(),
        "seconds": estimator.seconds(shared, rates),
        "tokens_per_second": asdict(rates),
        "keep_weights": keep,
        "memory_bytes": estimator.memory(left),
        "disk_bytes": estimate.disk_need(bench, control.units, keep, profile.max_parallel),
    }


def show_plan(found: dict[str, Any]) -> None:
    """Print a plan for people."""
    runs, units, cost, alone = found["runs"], found["units"], found["cost"], found["cost_without_sharing"]
    plural = "s" * (runs["all"] != 1)
    typer.echo(f"{found['sweep']}: {runs['all']} run{plural}, {runs['done']} done, {runs['to_do']} to do")
    for reason, count in list(found["reasons"].items())[:SHOWN]:
        typer.echo(f"  {count} × {reason}")
    _table(["units", "all", "to do", "for runs"],
           [[kind, str(counts["all"]), str(counts["to_do"]), str(counts["runs"])] for kind, counts in units.items()])
    if runs["to_do"] > cost["unknown"]:
        _show_costs(cost, alone)
        typer.echo(f"Disk: {_bytes(found['disk_bytes'])} with --keep-weights {found['keep_weights']}. "
                   f"Memory of one run: at most {_bytes(found['memory_bytes'])}. "
                   f"Time: {_time(found['seconds'])}.")
    if cost["unknown"]:
        typer.echo(f"{cost['unknown']} runs are left out of the costs: their model or data is not on this machine.")


def status_data(control: Control, standings: Sequence[Standing]) -> dict[str, Any]:
    """States as plain data."""
    return {
        "sweep": control.submission.sweep.name,
        "states": _counts(standings),
        "seconds_left": states.seconds_left(standings),
        "units": [_standing_data(control, standing) for standing in standings],
    }


def show_status(control: Control, standings: Sequence[Standing]) -> None:
    """Print one line per state, and what failed, why, and where its log is."""
    _table(*_state_rows(standings))
    troubled = [standing for standing in standings if standing.state in TROUBLE]
    for standing in troubled[:SHOWN]:
        log = states.log_of(control.paths, standing)
        typer.echo(f"{standing.state.value}: {standing.unit.kind} {standing.unit.label}: {standing.reason}"
                   + (f"\n  log: {log}" if log is not None and log.exists() else ""))
    if len(troubled) > SHOWN:
        typer.echo(f"… and {len(troubled) - SHOWN} more; --json lists them all")
    waits = Counter(standing.reason for standing in standings if standing.state is State.QUEUED and standing.reason)
    for reason, count in waits.most_common():
        typer.echo(f"queued: {count} units, of which Slurm says {reason}")
    left = states.seconds_left(standings)
    if left is not None:
        typer.echo(f"About {_duration(left)} left.")


def follow(control: Control, every: float = 5) -> list[Standing]:
    """Look until nothing is in the queue or at work, showing the states on a terminal; returns how it ended."""
    console = progress.console()
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while True:
            standings = control.watch.look()
            if console.is_terminal:
                live.update(_state_table(standings), refresh=True)
            if not any(standing.state in ALIVE for standing in standings):
                return standings
            time.sleep(every)


@contextmanager
def counting(control: Control, *, local: bool) -> Iterator[tuple[Callable[[int], None], Callable[[Unit, str], None]]]:
    """Callbacks that show progress while units are handed in or done."""
    with progress.track("Units" if local else "Submitting") as bar:

        def began(total: int) -> None:
            bar.update(total=total)

        def changed(unit: Unit, outcome: str) -> None:
            bar.advance(note=unit.label)
            if outcome == "failed":
                progress.say(f"failed: {unit.kind} {unit.label}; see {control.paths.logs / unit.name}.log")

        yield began, changed


def print_log(control: Control, text: str, lines: int) -> None:
    """Print the last lines of the log of the unit that `text` names. Raises `EmoSelectError` where there is none."""
    standing = find(control.watch.look(), text)
    log = states.log_of(control.paths, standing)
    if log is None or not log.exists():
        raise EmoSelectError(f"{standing.unit.label} has no log yet: it is {standing.state.value}.")
    progress.say(str(log))
    sys.stdout.write("".join(log.read_text(errors="replace").splitlines(keepends=True)[-lines:]))


def show_report(found: dict[str, Any]) -> None:
    """Print what a sweep has cost."""
    _table(["cost", "units", "attempts", "not done", "time", "GPU time", "tokens", "peak memory"],
           [[kind, str(sums["units"]), str(sums["attempts"]), str(sums["not_done"]), _duration(sums["seconds"]),
             _duration(sums["gpu_seconds"]), f"{sums['tokens']:,}", _bytes(sums["peak_memory"])]
            for kind, sums in (*found["kinds"].items(), ("total", found["total"]))])
    for name in ("hosts", "gpus", "commits"):
        if found[name]:
            typer.echo(f"{name}: " + ", ".join(f"{value} ({count})" for value, count in found[name].items()))
    if found["running"]:
        typer.echo(f"at work now, not counted: {found['running']}")
    if found["killed"]:
        typer.echo(f"killed, their time unknown: {found['killed']}")
    for label in found["out_of_memory"]:
        typer.echo(f"ran out of memory once: {label}")
    for line in found["slowest"]:
        how = "" if line["outcome"] == "done" else f" ({line['outcome']})"
        typer.echo(f"{_duration(line['seconds']):>8}  {line['kind']:<11} {line['label']}{how}")


def show_table(control: Control) -> None:
    """Print the tables of the sweep's models and tasks."""
    from emo_select import tables

    records = tables.load_tree(control.tree.root)
    models, tasks = ({getattr(run.spec, name) for run in control.runs} for name in ("model_directory", "task"))
    known = {run.task for run in records.runs}
    if not known & tasks:
        return
    filters = tables.Filters(tuple(sorted(models)), tuple(sorted(tasks & known)))
    made, _ = tables.make("methods", records, tables.load_layout(None), filters=filters)
    show_results(made)


def _unit_counts(units: Iterable[Unit], todo: Iterable[Unit], kind: str) -> dict[str, int]:
    mine = [unit for unit in todo if unit.kind == kind]
    return {"all": sum(unit.kind == kind for unit in units), "to_do": len(mine),
            "runs": sum(len(unit.runs) for unit in mine)}


def _reason(control: Control, run: Any) -> str:
    steps = control.bench.steps(run)
    if steps is None:
        return control.bench.problems[run]
    return next(f"{step.stage}: {step.reason}" for step in steps if step.action.value == "run")


def _show_costs(cost: dict[str, int], alone: dict[str, int]) -> None:
    rows = []
    names = {"selection_tokens": "tokens, selection", "training_tokens": "tokens, training (both ways)",
             "evaluation_tokens": "tokens, evaluation", "bytes_read": "weights read",
             "bytes_written": "weights written"}
    for key, name in names.items():
        written = _bytes if key.startswith("bytes") else "{:,}".format
        saved = f"{1 - cost[key] / alone[key]:.0%}" if alone[key] else ""
        rows.append([name, written(cost[key]), written(alone[key]), saved])
    _table(["left to do", "shared", "each run alone", "saved"], rows)


def _bytes(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def _state_table(standings: Sequence[Standing]) -> Table:
    names, rows = _state_rows(standings)
    return build([Column(name, right=number > 0) for number, name in enumerate(names)],
                 [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows])


def _state_rows(standings: Sequence[Standing]) -> tuple[list[str], list[list[str | Text]]]:
    rows: list[list[str | Text]] = []
    for state in State:
        those = [standing for standing in standings if standing.state is state]
        if those:
            per_kind = [str(sum(standing.unit.kind == kind for standing in those) or "") for kind in KINDS]
            rows.append([Text(state.value, STYLES.get(state, "")), str(len(those)), *per_kind])
    return ["state", "units", *KINDS], rows


def _counts(standings: Iterable[Standing]) -> dict[str, int]:
    found = Counter(standing.state.value for standing in standings)
    return {state.value: found[state.value] for state in State if found[state.value]}


def _standing_data(control: Control, standing: Standing) -> dict[str, Any]:
    log = states.log_of(control.paths, standing)
    return {"unit": standing.unit.name, "kind": standing.unit.kind, "label": standing.unit.label,
            "state": standing.state.value, "reason": standing.reason, "failures": standing.failures,
            "job": standing.job, "log": str(log) if log else None,
            "attempt": standing.attempt.model_dump(mode="json") if standing.attempt else None}


def _table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    show([Column(name, right=number > 0) for number, name in enumerate(columns)], rows)


def _duration(seconds: float) -> str:
    from emo_select.pipeline.cost import duration

    return duration(seconds)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "nothing alike was measured here yet; give --tokens-per-second"
    return f"about {_duration(seconds)} of one GPU (or of this machine)"
