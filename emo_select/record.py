"""`run.json`: what a run is, and for each finished stage what it was made from, by what, and what it cost.

A stage's completion record is written last, after its outputs are in place. It counts only while its fingerprint
(of everything the stage depends on) is the current one and the files it names are there in full.
"""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from emo_select.checkpoint.card import CARD
from emo_select.errors import CheckpointError
from emo_select.spec import Frozen, RunSpec
from emo_select.storage import read_json, write_json
from emo_select.tree import RunPaths

ACTIVATIONS_KEY = "stage_fingerprint"
_PACKAGES = ("emo-select", "torch", "transformers", "datasets", "lm-eval", "peft", "accelerate")


STATISTICS = 2
"""Version of the stored statistics. 2: `reap` weighs by the gate that the model applies, not a renormalised one."""


class StageRecord(Frozen):
    """One finished stage."""

    fingerprint: str
    started: str
    seconds: float
    peak_memory: int | None = None
    """Largest resident memory of the process during the stage, bytes."""
    peak_gpu_memory: int | None = None
    """Largest memory allocated on the GPU during the stage, bytes."""
    host: str = ""
    device: str = "cpu"
    versions: dict[str, str] = {}
    commit: str | None = None
    outputs: dict[str, int] = {}
    """Files relative to the run directory, with their sizes in bytes."""
    notes: dict[str, Any] = {}


class RunRecord(Frozen):
    """The content of `run.json`."""

    format: int = 1
    spec: RunSpec
    model_fingerprint: str = ""
    data_fingerprint: str = ""
    task_name: str | None = None
    """What the task calls itself, where it has another name in the tree."""
    task_file: str | None = None
    """Where the file of a user's own task lay."""
    stages: dict[str, StageRecord] = {}


@dataclass
class Measurement:
    """What a stage adds to its record while it runs."""

    notes: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    seconds: float = 0.0
    peak_memory: int | None = None
    peak_gpu_memory: int | None = None


def load(paths: RunPaths) -> RunRecord | None:
    """Read `run.json`; None where there is none. A damaged one is a `CheckpointError` that names it."""
    if not paths.record.exists():
        return None
    try:
        return RunRecord.model_validate(read_json(paths.record))
    except ValidationError as error:
        raise CheckpointError(
            f"{paths.record} was not written by this version ({error.errors()[0]['msg']}); move it away."
        ) from None


def save(paths: RunPaths, record: RunRecord) -> None:
    """Replace `run.json`."""
    write_json(paths.record, record.model_dump(mode="json"))


def finish(paths: RunPaths, record: RunRecord, stage: str, fingerprint: str, outputs: list[Path],
           measured: Measurement, device: str) -> RunRecord:
    """Add the completion record of `stage` and publish the file."""
    done = StageRecord(
        fingerprint=fingerprint,
        started=measured.started,
        seconds=round(measured.seconds, 3),
        peak_memory=measured.peak_memory,
        peak_gpu_memory=measured.peak_gpu_memory,
        host=socket.gethostname(),
        device=device,
        versions=versions(),
        commit=commit(),
        outputs=sizes(paths.directory, outputs),
        notes=measured.notes,
    )
    record = record.model_copy(update={"stages": {**record.stages, stage: done}})
    save(paths, record)
    return record


class State(Enum):
    """How a stage's completion record compares with what is wanted now."""

    DONE = "done"
    MISSING = "missing"
    STALE = "stale"
    GONE = "gone"
    """Done for the wanted fingerprint, but its files were removed since."""


def state(paths: RunPaths, record: RunRecord | None, stage: str, fingerprint: Callable[[], str]) -> tuple[State, str]:
    """Compare the record of `stage` with the wanted fingerprint and its files with what it says of them.

    Without a record the fingerprint, for which weights may have to be read, is not asked for.
    """
    done = record.stages.get(stage) if record else None
    if done is None:
        return State.MISSING, "missing"
    if done.fingerprint != fingerprint():
        return State.STALE, "stale: what it was made from has changed"
    for name, size in done.outputs.items():
        path = paths.directory / name
        if not path.is_file() or path.stat().st_size != size:
            return State.GONE, f"{name} is gone or has another size"
    return State.DONE, "done"


def forget(paths: RunPaths, record: RunRecord, names: Iterable[str]) -> RunRecord:
    """Remove completion records before their outputs are replaced, so that a crash between leaves none that lies."""
    unwanted = set(names)
    kept = {name: done for name, done in record.stages.items() if name not in unwanted}
    if len(kept) == len(record.stages):
        return record
    record = record.model_copy(update={"stages": kept})
    save(paths, record)
    return record


def activations_fingerprint(record_file: Path) -> str | None:
    """The fingerprint that shared statistics were collected for; None where there are none."""
    return str(read_json(record_file).get(ACTIVATIONS_KEY)) if record_file.exists() else None


def sizes(root: Path, outputs: list[Path]) -> dict[str, int]:
    """Every file under `outputs`, relative to `root`, with its size in bytes; cards change when scores come in."""
    files = [file for path in outputs for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {str(file.relative_to(root)): file.stat().st_size for file in files
            if file.is_file() and file.name != CARD}


@contextmanager
def measured() -> Iterator[Measurement]:
    """Time the body and note the peak memory of this process (and of the GPU where torch uses one)."""
    result, begin = Measurement(started=datetime.now(UTC).isoformat(timespec="seconds")), time.perf_counter()
    _reset_peaks()
    yield result
    result.seconds = time.perf_counter() - begin
    result.peak_memory, result.peak_gpu_memory = peak_memory(), peak_gpu_memory()


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str | None:
    """The git commit of the running code, with `+` where it has local changes; None outside a checkout."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]  # a look must not take the index's lock
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _reset_peaks() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the largest resident size so far
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int | None:
    """Largest resident memory of this process since the last stage began, bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def peak_gpu_memory() -> int | None:
    """Largest memory allocated on the GPU since the last stage began, bytes; None where none was used."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.max_memory_allocated()) if torch is not None and torch.cuda.is_initialized() else None
