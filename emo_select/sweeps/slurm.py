"""Handing units to Slurm as arrays, asking it what became of them, taking them back.

Units of shared work make an array A. Of the runs that wait for them, the first of each makes an array B1, the second
of each B2, …, in the order of A, and each B depends on A task by task (`aftercorr`): what fails stops only the runs
that need it. `kill-on-invalid-dep` removes those from the queue.
"""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from emo_select.errors import EmoSelectError, SpecError
from emo_select.sweeps import store
from emo_select.sweeps.graph import Unit
from emo_select.sweeps.profile import Profile, gigabytes
from emo_select.sweeps.store import Array
from emo_select.sweeps.work import UnitJob
from emo_select.tree import SweepPaths

USUAL_ARRAY_SIZE = 1001  # Slurm's default MaxArraySize, where it cannot be asked
QUERY_TIMEOUT_S = 60
NO_SLURM = "There is no Slurm here (`{}` is missing); use --executor local."


@dataclass(frozen=True)
class Block:
    """Units for one array and what it waits for, as positions of earlier blocks."""

    units: tuple[Unit, ...]
    after_all: tuple[int, ...] = ()
    """Blocks that must succeed as a whole."""
    after_each: int | None = None
    """A block of which unit i must succeed before unit i here starts."""
    after_any: int | None = None
    """A block that must end first, only so that not too much runs at the same time."""
    after_jobs: tuple[str, ...] = ()
    """Jobs that are in the queue already and must end first."""
    at_once: int = 1
    """How many units may run at the same time."""

    @property
    def kind(self) -> str:
        """What all its units are."""
        return self.units[0].kind


def blocks(units: Mapping[str, Unit], array_size: int, max_parallel: int | None = None,
           live: Mapping[str, str] | None = None) -> list[Block]:
    """Arrange units that are to be done (by name, each after those it needs) into arrays.

    Needs that are not among `units` are done already, or have a job in the queue: `live` gives the ids of all units'
    jobs there, which count for `max_parallel`, too.
    """
    live = live or {}
    fetch = [unit for unit in units.values() if unit.kind == "fetch"]
    found = [Block((unit,)) for unit in fetch]
    gate = (0,) if fetch else ()
    parents = [unit for unit in units.values() if unit.kind in ("activations", "select")]
    children = {parent.name: [unit for unit in units.values() if parent.name in unit.needs] for parent in parents}
    for kind in ("activations", "select"):  # those with most runs first, so that every B is a beginning of A
        ranked = sorted((unit for unit in parents if unit.kind == kind), key=lambda unit: -len(children[unit.name]))
        for chunk in _chunks(ranked, array_size):
            found.append(Block(chunk, gate))
            at = len(found) - 1
            found += [Block(column, after_each=at) for column in _columns([children[unit.name] for unit in chunk])]
    free = [unit for unit in units.values() if unit.kind == "run" and not any(name in children for name in unit.needs)]
    for waits in (False, True):  # what waits for a job in the queue is kept apart from what need not
        chosen = [unit for unit in free if any(name in live for name in unit.needs) is waits]
        for chunk in _chunks(chosen, array_size):
            jobs = {live[name] for unit in chunk for name in unit.needs if name in live}
            found.append(Block(chunk, gate, after_jobs=tuple(sorted(jobs))))
    return _limited(found, max_parallel, sorted(set(live.values())))


def submit(paths: SweepPaths, found: Sequence[Block], profile: Profile) -> list[Array]:
    """Hand blocks to Slurm; each is recorded before and after, so that a killed submitter leaves nothing unknown.

    Raises `SpecError` where there is no Slurm, `EmoSelectError` with Slurm's own words where it refuses.
    """
    if shutil.which("sbatch") is None:
        raise SpecError(NO_SLURM.format("sbatch"))
    paths.logs.mkdir(parents=True, exist_ok=True)
    done: list[Array] = []
    for block in found:
        array = Array(name=uuid.uuid4().hex, kind=block.kind, units=tuple(unit.name for unit in block.units), job=None,
                      submitted=time.time())
        store.save_array(paths, array)
        try:
            job = _submit_block(paths, block, profile, array.name, done)
        except EmoSelectError:
            store.drop_array(paths, array)
            raise
        done.append(array.model_copy(update={"job": job}))
        store.save_array(paths, done[-1])
    return done


def scripts(paths: SweepPaths, found: Sequence[Block], profile: Profile) -> Iterator[str]:
    """The batch scripts that `submit` would use, with `<array N>` in place of ids that Slurm has yet to give."""
    from submitit.slurm.slurm import _make_sbatch_string

    arrays = [Array(name=f"array-{number}", kind=block.kind, units=tuple(unit.name for unit in block.units),
                    job=f"<array {number}>", submitted=0.0) for number, block in enumerate(found, 1)]
    command = f"{profile.python or 'python'} -u -m submitit.core._submit {paths.logs.absolute()}"
    for array, block in zip(arrays, found, strict=True):
        options = _options(paths, block, profile, array.name, arrays)
        memory = {"mem": f"{options.pop('mem'):g}GB"} if "mem" in options else {}
        size = {"map_count": len(block.units)} if len(block.units) > 1 else {}
        yield _make_sbatch_string(command=command, folder=paths.logs.absolute(), **options, **memory, **size)


def array_size(profile: Profile) -> int:
    """The longest array allowed: the profile's, else what Slurm is configured for, else what it usually is."""
    if profile.array_size is not None:
        return profile.array_size
    try:
        answer = _ask("scontrol", "show", "config")
    except EmoSelectError:
        return USUAL_ARRAY_SIZE  # no Slurm here: scripts can be shown all the same
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer, re.MULTILINE)
    return int(found[1]) if found else USUAL_ARRAY_SIZE


@dataclass(frozen=True)
class Queued:
    """A job that Slurm still has."""

    state: str
    reason: str
    comment: str
    time_left: str

    @property
    def running(self) -> bool:
        """Whether it has a node, be it in the act of starting or ending."""
        return self.state not in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")

    @property
    def held(self) -> bool:
        """Whether it waits until its user lets it go. What an administrator holds, no user can."""
        return "held" in self.reason.lower() and self.reason != "JobHeldAdmin"

    @property
    def forsaken(self) -> bool:
        """Whether it waits for a job that was taken back, so that it can never start."""
        return self.reason == "DependencyNeverSatisfied"


def queue() -> dict[str, Queued]:
    """All jobs of this user that have not ended, by id (`12` or `12_3`), in one query."""
    lines = _ask("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T|%r|%k|%L").splitlines()
    parts = (line.split("|") for line in lines if line.count("|") >= 4)
    return {part[0]: Queued(part[1], part[2], part[3], part[4]) for part in parts}


def ended(jobs: Iterable[str]) -> dict[str, str]:
    """How jobs ended (COMPLETED, TIMEOUT, OUT_OF_MEMORY, NODE_FAIL, …), by id, in one query of the accounting."""
    arrays = sorted({job.split("_")[0] for job in jobs})
    if not arrays:
        return {}
    try:
        answer = _ask("sacct", "-X", "-n", "-P", "-j", ",".join(arrays), "-o", "JobID,State")
    except EmoSelectError:
        return {}  # without accounting, what a job wrote itself has to do
    pairs = (line.split("|") for line in answer.splitlines() if "|" in line)
    return {job: state.split()[0] for job, state in pairs if state}


def cancel(jobs: Iterable[str]) -> None:
    """Take jobs back, whole arrays where all ids of one are named."""
    ids = sorted(set(jobs))
    if ids:
        _ask("scancel", *ids)


def release(jobs: Iterable[str]) -> None:
    """Let held jobs go."""
    ids = sorted(set(jobs))
    if ids:
        _ask("scontrol", "release", ",".join(ids))


def orphans(paths: SweepPaths, live: Mapping[str, Queued]) -> list[str]:
    """Array ids in the queue of which this sweep has only the intention on record: their submitter was killed."""
    lost = {array.name for array in store.arrays(paths) if array.job is None}
    return sorted({job.split("_")[0] for job, entry in live.items() if entry.comment in lost})


def _submit_block(paths: SweepPaths, block: Block, profile: Profile, name: str, before: Sequence[Array]) -> str:
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        executor = SlurmExecutor(paths.logs.absolute(), max_num_timeout=profile.max_requeues, python=profile.python)
        executor.update_parameters(**_options(paths, block, profile, name, before))
        with executor.batch():
            jobs = [executor.submit(UnitJob(), str(paths.unit(unit.name).absolute())) for unit in block.units]
        return str(jobs[0].job_id.split("_")[0])
    except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, RuntimeError) as error:
        raise EmoSelectError(f"Slurm did not take the units: {_last_words(error)} What was submitted before runs; "
                             "`emo-select sweep resume` submits the rest.") from error


def _options(paths: SweepPaths, block: Block, profile: Profile, name: str,
             before: Sequence[Array]) -> dict[str, Any]:
    """submitit's parameters for one array."""
    needed = {key: getattr(profile, key) for key in ("partition", "account", "qos", "constraint")}
    gpus = profile.gpus if block.kind != "fetch" else 0
    extra = {"kill-on-invalid-dep": "yes", "requeue": True, "comment": name, **profile.extra}
    waits = _dependency(block, before)
    return {
        **{key: value for key, value in needed.items() if value is not None},
        **({"gpus_per_node": gpus} if gpus else {}),
        **({"mem": gigabytes(profile.memory)} if profile.memory else {}),
        **({"setup": list(profile.setup)} if profile.setup else {}),
        "job_name": f"emo-{paths.directory.name}-{block.kind}", "time": profile.minutes, "nodes": 1,
        "ntasks_per_node": 1, "cpus_per_task": profile.cpus, "array_parallelism": block.at_once,
        "signal_delay_s": min(profile.signal_before, profile.minutes * 30),
        "additional_parameters": {**extra, **({"dependency": waits} if waits else {})},
    }


def _dependency(block: Block, before: Sequence[Array]) -> str:
    conditions = [f"afterok:{before[at].job}" for at in block.after_all]
    if block.after_each is not None:  # the correspondence is one of arrays; a single job names what it needs
        parent = before[block.after_each]
        single = len(block.units) == 1
        conditions.append(f"afterok:{parent.job_id(0)}" if single else f"aftercorr:{parent.job}")
    if block.after_any is not None:
        conditions.append(f"afterany:{before[block.after_any].job}")
    if block.after_jobs:
        conditions.append(":".join(("afterany", *block.after_jobs)))
    return ",".join(conditions)


def _columns(rows: Sequence[Sequence[Unit]]) -> list[tuple[Unit, ...]]:
    """The first of each row, the second of each, …; rows are sorted by length, longest first."""
    longest = len(rows[0]) if rows else 0
    return [tuple(row[at] for row in rows if at < len(row)) for at in range(longest)]


def _chunks(units: Sequence[Unit], size: int) -> Iterator[tuple[Unit, ...]]:
    for start in range(0, len(units), size):
        yield tuple(units[start:start + size])


def _limited(found: Sequence[Block], max_parallel: int | None, live: Sequence[str] = ()) -> list[Block]:
    """Share out `max_parallel`: arrays in as many lanes as may run side by side, one after the other in each lane.

    Jobs in the queue leave the new ones the rest of it; where there is none, these wait until those have ended.
    """
    if max_parallel is None:
        return [replace(block, at_once=len(block.units)) for block in found]
    if len(live) >= max_parallel:
        return [block if block.after_any is not None else
                replace(block, after_jobs=tuple(sorted({*block.after_jobs, *(job.split("_")[0] for job in live)})))
                for block in _limited(found, max_parallel)]
    max_parallel -= len(live)
    first = 1 if found and found[0].kind == "fetch" else 0  # runs alone, before all others
    lanes = min(max_parallel, max(1, len(found) - first))
    limited = list(found[:first])
    for number, block in enumerate(found[first:]):
        share = max_parallel // lanes + (number % lanes < max_parallel % lanes)
        previous = first + number - lanes if number >= lanes else None
        limited.append(replace(block, after_any=previous, at_once=min(share, len(block.units))))
    return limited


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True)
    except FileNotFoundError:
        raise SpecError(NO_SLURM.format(command[0])) from None
    except subprocess.TimeoutExpired:
        raise EmoSelectError(f"Slurm did not answer `{command[0]}` within {QUERY_TIMEOUT_S} s; try again.") from None
    except subprocess.CalledProcessError as error:
        raise EmoSelectError(f"Slurm refused `{' '.join(command)[:200]}`: {error.stderr.strip()}") from None
    return done.stdout


def _last_words(error: BaseException) -> str:
    reason = error.__cause__
    if isinstance(reason, subprocess.CalledProcessError):  # which says nothing but that it failed
        reason = None
    text = str(reason or error).strip().splitlines()
    return text[-1] if text else type(error).__name__
