"""What has become of each unit: asked of the run tree first, then of Slurm's queue, then of the attempts' records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import mean

from emo_select.errors import EmoSelectError
from emo_select.progress import say_once
from emo_select.storage import is_held
from emo_select.sweeps import slurm, store
from emo_select.sweeps.bench import Bench, pending
from emo_select.sweeps.graph import Unit
from emo_select.sweeps.store import Array, Attempt
from emo_select.tree import SweepPaths

FAILURES = 2  # after so many, a unit is set aside
USUAL_REASONS = ("None", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit")  # it starts by itself


class State(StrEnum):
    """State of a unit, in the order in which they are listed."""

    DONE = "done"
    RUNNING = "running"
    QUEUED = "queued"
    WAITING = "waiting"
    """In the queue, but something that it needs is not done yet."""
    HELD = "held"
    """In the queue, but Slurm or its user holds it there, as happens after a node failed; `resume` lets it go."""
    MISSING = "missing"
    """Not handed in, or taken back before it began."""
    LOST = "lost"
    """Began and ended without a word: cancelled, killed, or its node failed."""
    STALE = "stale"
    """Was done; since then its inputs changed, its files went, or it was given more to do."""
    FAILED = "failed"
    BLOCKED = "blocked"
    """Cannot begin, because something that it needs failed."""
    SET_ASIDE = "set aside"
    """Failed twice, or got nowhere within its time; `resume` leaves it alone unless told otherwise."""


ALIVE = (State.RUNNING, State.QUEUED, State.WAITING)
HANDED_IN = (*ALIVE, State.HELD)


@dataclass(frozen=True)
class Standing:
    """A unit's state, why, and where to read more."""

    unit: Unit
    state: State
    reason: str = ""
    job: str | None = None
    attempt: Attempt | None = None
    failures: int = 0


@dataclass
class Watch:
    """Looks at a sweep again and again; what was done once is not planned again."""

    paths: SweepPaths
    units: Sequence[Unit]
    bench: Bench
    needs_queue: bool = False
    """Whether units may be handed in, which must not be there twice."""
    _done: set[str] = field(default_factory=set)

    def look(self) -> list[Standing]:
        """The standing of every unit now: one query of the queue, and one of the accounting if jobs have vanished."""
        arrays, tries = store.arrays(self.paths), store.attempts(self.paths)
        jobs = _latest_jobs(arrays)
        live = self._queue(arrays)
        self._update_done(tries)
        vanished = [job for name, job in jobs.items() if name not in self._done and job not in live]
        how = slurm.ended(vanished)
        found: dict[str, Standing] = {}
        for unit in self.units:
            job = jobs.get(unit.name)
            found[unit.name] = self._standing(unit, tries.get(unit.name, ()), job, live, how, found)
        return list(found.values())

    def _queue(self, arrays: Sequence[Array]) -> Mapping[str, slurm.Queued]:
        """What Slurm has of the sweep. Where it cannot be asked and need not be, records alone have to do."""
        if not arrays:
            return {}
        try:
            return slurm.queue()
        except EmoSelectError as error:
            if self.needs_queue:
                raise
            say_once(f"What Slurm has in its queue is not known: {error}")
            return {}

    def _update_done(self, tries: Mapping[str, Sequence[Attempt]]) -> None:
        """Units that have nothing left to do, by the pipeline's own plan. Later looks only ask about news."""
        open_units = [unit for unit in self.units if unit.name not in self._done]
        first = not self._done
        asked = [unit for unit in open_units if first or _may_be_done(tries.get(unit.name, ()))]
        left = pending(self.bench, asked)
        self._done |= {unit.name for unit in asked if unit.name not in left and unit.kind != "fetch"}
        others = {unit.name for unit in self.units if unit.kind != "fetch"}
        for unit in self.units:
            if unit.kind == "fetch" and (others <= self._done or _may_be_done(tries.get(unit.name, ()))):
                self._done.add(unit.name)

    def _standing(self, unit: Unit, tries: Sequence[Attempt], job: str | None, live: Mapping[str, slurm.Queued],
                  how: Mapping[str, str], before: Mapping[str, Standing]) -> Standing:
        last = tries[-1] if tries else None
        failures = sum(attempt.outcome == "failed" for attempt in tries)
        state, reason = self._state(unit, last, job, live, how, before, failures)
        return Standing(unit, state, reason, job, last, failures)

    def _state(self, unit: Unit, last: Attempt | None, job: str | None, live: Mapping[str, slurm.Queued],
               how: Mapping[str, str], before: Mapping[str, Standing], failures: int) -> tuple[State, str]:
        if unit.name in self._done:
            return State.DONE, ""
        if job is not None and job in live:
            return _in_queue(live[job])
        if last is not None and last.outcome == "running" and is_held(self.paths.unit_lock(unit.name)):
            return State.RUNNING, ""
        if last is not None and last.outcome == "stuck":
            return State.SET_ASIDE, last.error or ""
        if last is not None and last.outcome in ("failed", "locked"):
            state = State.SET_ASIDE if failures >= FAILURES else State.FAILED
            return state, last.error or ""
        broken = [before[name] for name in unit.needs if before[name].state in _BROKEN]
        if broken:
            culprit = broken[0]
            return State.BLOCKED, f"needs {culprit.unit.kind} of {culprit.unit.label}, which {_HOW[culprit.state]}"
        if last is not None and last.outcome == "done":
            return State.STALE, self.bench.why(unit)
        if last is None:
            return State.MISSING, _never_began(how.get(job or ""))
        return State.LOST, _words(last, how.get(job or ""))


_BROKEN = (State.FAILED, State.SET_ASIDE, State.BLOCKED)
_HOW = {State.FAILED: "failed", State.SET_ASIDE: "is set aside", State.BLOCKED: "is blocked itself"}


def seconds_left(standings: Sequence[Standing]) -> float | None:
    """Time until the units at work and in the queue are done, by what their like took; None where none is done yet."""
    taken: dict[str, list[float]] = {}
    for standing in standings:
        if standing.state is State.DONE and standing.attempt is not None and standing.attempt.outcome == "done":
            taken.setdefault(standing.unit.kind, []).append(standing.attempt.seconds)
    todo = [standing for standing in standings if standing.state in ALIVE]
    running = sum(standing.state is State.RUNNING for standing in todo)
    if not running or any(standing.unit.kind not in taken for standing in todo):
        return None
    return sum(mean(taken[standing.unit.kind]) for standing in todo) / running


def log_of(paths: SweepPaths, standing: Standing) -> Path | None:
    """Where the unit's last attempt wrote what it had to say."""
    if standing.attempt is not None and standing.attempt.log is not None:
        return Path(standing.attempt.log)
    return paths.logs / f"{standing.job}_0_log.err" if standing.job is not None else None


def _latest_jobs(arrays: Sequence[Array]) -> dict[str, str]:
    """Slurm's id of each unit's latest job."""
    return {unit: array.job_id(index) for array in arrays if array.job is not None
            for index, unit in enumerate(array.units)}


def _may_be_done(tries: Sequence[Attempt]) -> bool:
    return bool(tries) and tries[-1].outcome == "done"


def _in_queue(entry: slurm.Queued) -> tuple[State, str]:
    if entry.running:
        return State.RUNNING, f"{entry.time_left} of its time left"
    if entry.forsaken:
        return State.WAITING, "for a job that was taken back"
    if entry.reason == "Dependency":
        return State.WAITING, ""
    if entry.held:
        return State.HELD, entry.reason
    return State.QUEUED, "" if entry.reason in USUAL_REASONS else entry.reason


def _never_began(how: str | None) -> str:
    return f"taken back before it began ({how})" if how else "not handed in"


def _words(last: Attempt, how: str | None) -> str:
    if how is not None and how not in ("RUNNING", "COMPLETED"):
        return f"ended by Slurm: {how}"
    return "interrupted" if last.outcome == "interrupted" else f"its process on {last.host} ended without a word"
