"""What a sweep keeps on disk: units, attempts at them, arrays handed to Slurm. Every file appears by rename."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from emo_select.errors import SpecError
from emo_select.spec import Frozen, checked
from emo_select.storage import is_held, read_json, write_json
from emo_select.sweeps.graph import Unit
from emo_select.sweeps.profile import Profile
from emo_select.sweeps.spec import SweepSpec
from emo_select.tree import SweepPaths, Tree

Keep = Literal["none", "last", "all"]
Outcome = Literal["running", "done", "failed", "locked", "interrupted", "stuck", "killed"]
"""`killed` is never recorded: it is what became of an attempt that says `running` while no process works on the unit.
"""


class Job(Frozen):
    """A unit as a worker reads it: all it has to know, and nothing else."""

    root: str
    sweep: str
    unit: Unit
    keep_weights: Keep = "all"
    micro_batch_size: int | None = None
    """Overrides that of the runs after an attempt ran out of memory."""


class Attempt(Frozen):
    """One attempt at a unit."""

    unit: str
    kind: str
    number: int
    outcome: Outcome
    host: str
    pid: int
    job: str | None = None
    """Slurm's id of it."""
    log: str | None = None
    started: float
    seconds: float = 0.0
    peak_memory: int | None = None
    peak_gpu_memory: int | None = None
    gpus: tuple[str, ...] = ()
    tokens: int = 0
    versions: dict[str, str] = {}
    commit: str | None = None
    micro_batch_size: int | None = None
    """What it was cut to after running out of memory; None where it was not."""
    error: str | None = None
    mark: str | None = None
    """Of what lay on disk when it began: two equal ones mean that nothing was finished or saved between them."""
    notes: dict[str, Any] = {}


class Array(Frozen):
    """Units that were handed to Slurm together."""

    name: str
    kind: str
    units: tuple[str, ...]
    job: str | None
    """Slurm's id; None until Slurm has answered."""
    submitted: float

    def job_id(self, index: int) -> str:
        """Slurm's id of the unit at `index`. A single unit is a job of its own."""
        return f"{self.job}_{index}" if len(self.units) > 1 else str(self.job)


class Submission(Frozen):
    """The sweep as it was submitted last."""

    sweep: SweepSpec
    keep_weights: Keep = "all"
    profile: Profile = Profile()


def save_submission(paths: SweepPaths, submission: Submission) -> None:
    """Remember what was submitted, so that the sweep can be named without its file."""
    write_json(paths.record, submission.model_dump(mode="json"))


def load_submission(tree: Tree, name: str) -> Submission:
    """What was submitted under `name`. Raises `SpecError` where nothing was."""
    paths = tree.sweep(name)
    if not paths.record.exists():
        known = ", ".join(found.directory.name for found in tree.sweeps()) or "none yet"
        raise SpecError(f"No sweep {name!r} was submitted to {tree.root} (there: {known}); give a sweep file.")
    return checked(Submission, read_json(paths.record))


def save_jobs(paths: SweepPaths, jobs: Iterable[Job]) -> None:
    """Write units for their workers; files that say the same already are left alone."""
    for job in jobs:
        path, data = paths.unit(job.unit.name), job.model_dump(mode="json")
        if not path.exists() or read_json(path) != data:
            write_json(path, data)


def load_job(path: Path) -> Job:
    """Read a unit. Raises `SpecError` or `CheckpointError` where the file is damaged."""
    return checked(Job, read_json(path))


def save_attempt(paths: SweepPaths, attempt: Attempt) -> None:
    """Replace the record of an attempt."""
    write_json(paths.attempt(attempt.unit, attempt.number), attempt.model_dump(mode="json"))


def attempts(paths: SweepPaths) -> dict[str, list[Attempt]]:
    """All attempts of the sweep, by unit, oldest first."""
    found: dict[str, list[Attempt]] = {}
    for file in paths.attempts.glob("*.json"):
        attempt = checked(Attempt, read_json(file))
        found.setdefault(attempt.unit, []).append(attempt)
    return {unit: sorted(tries, key=lambda attempt: attempt.number) for unit, tries in found.items()}


def attempts_of(paths: SweepPaths, unit: str) -> list[Attempt]:
    """Attempts at one unit, oldest first."""
    found = (checked(Attempt, read_json(file)) for file in paths.attempts.glob(f"{unit}.*.json"))
    return sorted(found, key=lambda attempt: attempt.number)


def settled(paths: SweepPaths, tries: Sequence[Attempt]) -> list[Attempt]:
    """Attempts at one unit, oldest first, with `killed` for those that ended without saying so."""
    if not any(attempt.outcome == "running" for attempt in tries):
        return list(tries)
    at_work = tries[-1] if is_held(paths.unit_lock(tries[-1].unit)) else None
    return [attempt.model_copy(update={"outcome": "killed"})
            if attempt.outcome == "running" and attempt is not at_work else attempt for attempt in tries]


def next_number(paths: SweepPaths, unit: str) -> int:
    """Number of the attempt that begins now, from 1."""
    return max((attempt.number for attempt in attempts_of(paths, unit)), default=0) + 1


def save_array(paths: SweepPaths, array: Array) -> None:
    """Replace the record of an array."""
    write_json(paths.array(array.name), array.model_dump(mode="json"))


def drop_array(paths: SweepPaths, array: Array) -> None:
    """Forget an array that Slurm has refused."""
    paths.array(array.name).unlink(missing_ok=True)


def arrays(paths: SweepPaths) -> list[Array]:
    """Everything handed to Slurm, oldest first."""
    found = [checked(Array, read_json(file)) for file in paths.arrays.glob("*.json")]
    return sorted(found, key=lambda array: (array.submitted, array.name))
