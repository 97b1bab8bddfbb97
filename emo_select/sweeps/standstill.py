"""Units that are stopped again and again before they have finished or saved anything: requeueing them never ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from emo_select.errors import StandstillError
from emo_select.spec import digest
from emo_select.storage import partial_directory
from emo_select.sweeps.store import Attempt, Job
from emo_select.tree import Tree

IDLE_ATTEMPTS = 3
"""As many in a row may come to nothing: the first may have been unlucky with a slow node, or with a preemption."""
STOPPED = ("interrupted", "running")
"""How an attempt ends that was stopped, with and without having the time to say so."""
STATE = "state"
"""The folder of a training's state, whose files are replaced by others of the same size."""


def mark_of(job: Job) -> str | None:
    """Digest of what the unit has on disk: equal before two attempts if nothing was finished or saved between them.

    None for a fetch, whose downloads lie elsewhere.
    """
    if job.unit.kind == "fetch":
        return None
    files = (file for folder in _folders(job) for file in sorted(folder.rglob("*")) if _counts(file))
    return digest([(str(file), _size(file)) for file in files])


def require_progress(before: Sequence[Attempt], slurm_job: str | None, mark: str | None) -> None:
    """Raise `StandstillError` where the last attempts of this very job were stopped and left everything as it is."""
    last = before[-IDLE_ATTEMPTS:]
    idle = [attempt for attempt in last
            if attempt.job == slurm_job and attempt.mark == mark and attempt.outcome in STOPPED]
    if slurm_job is not None and mark is not None and len(idle) == IDLE_ATTEMPTS:
        raise StandstillError(
            f"It was stopped {IDLE_ATTEMPTS} times before it had finished or saved anything; give it more time: "
            "`emo-select sweep resume NAME --set-aside --time LONGER`.")


def _folders(job: Job) -> Iterator[Path]:
    tree = Tree(Path(job.root))
    if job.unit.kind == "activations":
        final = tree.activations(job.unit.runs[0].spec)
        yield from (final, partial_directory(final))
    else:
        yield from (tree.run(item.spec).directory for item in job.unit.runs)


def _counts(file: Path) -> bool:
    """Whether a file is work done; locks and what a killed process was about to rename are not."""
    return file.is_file() and not file.name.endswith((".lock", ".holder", ".partial"))


def _size(file: Path) -> int:
    """What grows with the work that a file holds. A reopened list of answers gets an empty line, which is no answer."""
    if file.suffix == ".jsonl":
        return sum(bool(line.strip()) for line in file.read_bytes().splitlines())
    info = file.stat()
    return info.st_mtime_ns if file.parent.name == STATE else info.st_size
