"""From runs to units of work: what several runs share is done once, by a unit that they wait for.

    fetch ─┬─ activations ─── runs of one-pass methods (all keep-k and methods of a model, task and calibration)
           ├─ select ──────── runs of layerwise (all keep-k of a model, task and calibration: one pass over the disk)
           └───────────────── runs that share nothing (random choice, models that skip selection)

Runs that differ only in how they are evaluated are one unit: it prunes and finetunes once. So are runs of several
methods or calibrations that keep all experts, which come to the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from emo_select.pipeline.adopt import twin_key
from emo_select.pipeline.runs import ONE_PASS
from emo_select.spec import Evaluation, Frozen, Training, digest
from emo_select.sweeps.spec import SweepRun

Kind = Literal["fetch", "activations", "select", "run"]
KINDS: tuple[Kind, ...] = ("fetch", "activations", "select", "run")


class Unit(Frozen):
    """What one job does. Its name depends on what it is, not on the file it came from."""

    name: str
    kind: Kind
    label: str
    """For people: the run's directory, or what the shared work is for."""
    runs: tuple[SweepRun, ...]
    needs: tuple[str, ...] = ()
    """Names of the units that have to be done before."""


def build(runs: Sequence[SweepRun]) -> list[Unit]:
    """The units of a sweep, each after those it needs."""
    if not runs:
        return []
    fetch = _unit("fetch", "models and data", _representatives(runs), ())
    workers = _grouped(runs).values()
    parents: list[Unit] = []
    children: list[Unit] = []
    needs: dict[str, str] = {}
    for key, groups in _by_parent(workers).items():
        if key is not None and len(groups) > 1:
            parents.append(_parent([run for group in groups for run in group], fetch.name))
            needs |= {twins_of(group[0]): parents[-1].name for group in groups}
    for group in workers:
        spec = group[0].spec
        parent = needs.get(twins_of(group[0]), fetch.name)
        children.append(_unit("run", f"{spec.model_directory}/{spec.directory_name}", group, (parent,)))
    return [fetch, *parents, *children]


def twins_of(run: SweepRun) -> str:
    """Equal for runs that share everything up to finetuning."""
    return twin_key(run.spec, keeps_all=run.keeps_all)


def parent_key(run: SweepRun) -> str | None:
    """Equal for runs whose selection shares work; None for runs whose selection needs no texts."""
    spec = run.spec
    if not spec.selects or run.keeps_all:
        return None
    if spec.method in ONE_PASS:
        return f"activations {spec.model_directory}/{spec.activations_name}"
    if spec.method != "layerwise":
        return None
    shared = {"keep_k": 1, "training": Training(), "evaluation": Evaluation()}
    return f"select {spec.model_copy(update=shared).model_dump_json()}"


def unshared(runs: Sequence[SweepRun]) -> list[Unit]:
    """The same runs, one unit each, as a plain list would have them: what sharing is compared with."""
    return [_unit("run", f"{run.spec.model_directory}/{run.spec.directory_name}", [run], ()) for run in runs]


def _by_parent(groups: Iterable[list[SweepRun]]) -> dict[str | None, list[list[SweepRun]]]:
    found: dict[str | None, list[list[SweepRun]]] = {}
    for group in groups:
        found.setdefault(parent_key(group[0]), []).append(group)
    return found


def _grouped(runs: Iterable[SweepRun]) -> dict[str, list[SweepRun]]:
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(twins_of(run), []).append(run)
    return groups


def _parent(runs: list[SweepRun], fetch: str) -> Unit:
    spec = runs[0].spec
    kind: Kind = "activations" if spec.method in ONE_PASS else "select"
    return _unit(kind, f"{spec.model_directory}/{spec.activations_name}", runs, (fetch,))


def _representatives(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Runs that together have every model, task and own file."""
    chosen: dict[object, SweepRun] = {}
    for run in runs:
        spec = run.spec
        for part in (spec.source, (spec.task, run.execution.data_dir), spec.calibration.file, spec.training.file):
            chosen.setdefault(part, run)
    return list(dict.fromkeys(chosen.values()))


def _unit(kind: Kind, label: str, runs: Sequence[SweepRun], needs: tuple[str, ...]) -> Unit:
    identity = [kind] if kind == "fetch" else [kind, label, parent_key(runs[0]) if kind == "select" else ""]
    return Unit(name=f"{kind}-{digest(identity)}", kind=kind, label=label, runs=tuple(runs), needs=needs)
