"""Where everything lies on disk, and how it gets there whole.

No other module knows a file name of the run tree. Every output appears by one rename: a reader sees the old file,
the new file or none, never a part. Directories grow in a hidden `.NAME.partial` beside their place, which survives
a crash so that the stage that writes it can continue.

    <root>/<model>/activations/<task>…/       scores.safetensors, scores.json
    <root>/<model>/<run>/                     run.json, selection.json, selected_model/,
                                              finetuned_model/checkpoint-N/, results/checkpoint-N/
    <root>/.sweeps/<name>/                    sweep.json, units/, attempts/, arrays/, logs/
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from emo_select import textfile
from emo_select.errors import CheckpointError, DiskSpaceError, LockedError, TextError
from emo_select.faults import at, existing_part, require_writable
from emo_select.ownership import (
    CHECKPOINT,
    FILES,
    OUTPUT,
    mark,
    require_own_files,
    require_replaceable,
    with_file,
)
from emo_select.spec import RunSpec, parse_directory_name

DEFAULT_ROOT = "selective_evals_final"
SWEEPS = ".sweeps"
WORKING = (".partial", ".old", ".key")  # ends of the names of what is under way
ROOT_VARIABLE = "EMO_SELECT_OUTPUT_DIR"
CACHE_VARIABLE = "EMO_SELECT_CACHE_DIR"


@dataclass(frozen=True)
class RunPaths:
    """The files of one run directory."""

    directory: Path

    @property
    def record(self) -> Path:
        """The resolved spec and one completion record per stage."""
        return self.directory / "run.json"

    @property
    def config(self) -> Path:
        """What the run was started with, everything resolved, as a file for `run --config`."""
        return self.directory / "config.yaml"

    @property
    def lock(self) -> Path:
        """Held by the one process that works on the run."""
        return self.directory / ".lock"

    @property
    def selection(self) -> Path:
        """The keep set."""
        return self.directory / "selection.json"

    @property
    def selection_work(self) -> Path:
        """Snapshots of a selection that is under way."""
        return self.directory / ".selection.partial"

    @property
    def selected_model(self) -> Path:
        """The pruned checkpoint."""
        return self.directory / "selected_model"

    @property
    def finetuned_model(self) -> Path:
        """Parent of the finetuned checkpoints."""
        return self.directory / "finetuned_model"

    @property
    def results(self) -> Path:
        """Parent of the result files, one folder per checkpoint."""
        return self.directory / "results"

    def checkpoint(self, step: int) -> Path:
        """Finetuned checkpoint after `step` optimiser steps; 0 is the pruned model."""
        return self.finetuned_model / f"checkpoint-{step}"

    def result(self, step: int) -> Path:
        """Result files of one checkpoint."""
        return self.results / f"checkpoint-{step}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the finetuned checkpoints that exist, ascending."""
        return numbered_checkpoints(self.finetuned_model)

    def result_steps(self) -> list[int]:
        """Steps of the checkpoints that have a results folder, ascending."""
        return numbered_checkpoints(self.results)


@dataclass(frozen=True)
class SweepPaths:
    """The files of one sweep: what was submitted and what came of it, never what is computed."""

    directory: Path

    @property
    def record(self) -> Path:
        """The sweep as it was submitted last."""
        return self.directory / "sweep.json"

    @property
    def lock(self) -> Path:
        """Held by the one process that submits, or runs the sweep here."""
        return self.directory / ".lock"

    @property
    def logs(self) -> Path:
        """Output of the units, and what submitit keeps."""
        return self.directory / "logs"

    def unit(self, name: str) -> Path:
        """One unit of work, resolved: all that a worker needs to know."""
        return self.directory / "units" / f"{name}.json"

    def unit_lock(self, name: str) -> Path:
        """Held by the one process that works on the unit."""
        return self.directory / "units" / f".{name}.lock"

    @property
    def attempts(self) -> Path:
        """Parent of the records of all attempts."""
        return self.directory / "attempts"

    def attempt(self, name: str, number: int) -> Path:
        """What came of one attempt at a unit."""
        return self.attempts / f"{name}.{number}.json"

    @property
    def arrays(self) -> Path:
        """Parent of the records of what was handed to Slurm."""
        return self.directory / "arrays"

    def array(self, name: str) -> Path:
        """One array that was handed to Slurm."""
        return self.arrays / f"{name}.json"


@dataclass(frozen=True)
class Tree:
    """A root that holds one folder per model."""

    root: Path

    @classmethod
    def at(cls, root: str | Path | None = None) -> Tree:
        """The tree at `root`, else at EMO_SELECT_OUTPUT_DIR, else at ./selective_evals_final."""
        return cls(Path(root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT))

    def run(self, spec: RunSpec) -> RunPaths:
        """Paths of the run that `spec` names."""
        return RunPaths(self.root / spec.model_directory / spec.directory_name)

    def activations(self, spec: RunSpec) -> Path:
        """Folder of the calibration statistics that `spec` uses."""
        return self.root / spec.model_directory / "activations" / spec.activations_name

    def activations_record(self, spec: RunSpec) -> Path:
        """Their description, which says what they were made from."""
        return self.activations(spec) / "scores.json"

    def activations_lock(self, spec: RunSpec) -> Path:
        """Held by the one process that collects those statistics."""
        folder = self.activations(spec)
        return folder.with_name(f".{folder.name}.lock")

    def runs(self, model: str | None = None) -> Iterator[RunPaths]:
        """Every run directory below the root (or one model folder), by model and name."""
        models = [self.root / model] if model else sorted(self.root.glob("*"))
        for folder in (path for parent in models if parent.is_dir() for path in sorted(parent.iterdir())):
            if folder.is_dir() and parse_directory_name(folder.name):
                yield RunPaths(folder)

    def sweep(self, name: str) -> SweepPaths:
        """Paths of the state of the sweep `name`."""
        return SweepPaths(self.root / SWEEPS / name)

    def sweeps(self) -> list[SweepPaths]:
        """Every sweep that was submitted in this tree, by name."""
        return [SweepPaths(file.parent) for file in sorted((self.root / SWEEPS).glob("*/sweep.json"))]

    def require_writable(self) -> None:
        """Raise `SpecError` where the root could not be created or written."""
        require_writable(self.root, f"--output-dir or {ROOT_VARIABLE}")


def cache_directory() -> Path:
    """Where what was computed is remembered: EMO_SELECT_CACHE_DIR, else below XDG_CACHE_HOME or ~/.cache.

    All of it can be deleted at any time; it only costs time.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(CACHE_VARIABLE) or home / "emo-select")


def numbered_checkpoints(folder: Path) -> list[int]:
    """The N of every `checkpoint-N` folder in `folder`, ascending."""
    if not folder.is_dir():
        return []
    found = (CHECKPOINT.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise `DiskSpaceError` unless the disk of `folder` has room for `needed` bytes of `what`."""
    require_writable(folder)
    existing = existing_part(folder)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskSpaceError(
            f"{what} needs {needed / 1e9:.2f} GB but {existing} has {free / 1e9:.2f} GB free; "
            "free some space or choose another --output-dir."
        )


@contextmanager
def output_directory(final: Path, key: str, what: str, needed: int, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """`staged_directory` for a command's own output: one process at a time, and `needed` bytes of room.

    What an interrupted call has written already needs no more room. Raises `LockedError`, `DiskSpaceError` and what
    `staged_directory` raises, before anything is written.
    """
    written = sum(path.stat().st_size for path in partial_directory(final).rglob("*") if path.is_file())
    require_space(final.parent, max(0, needed - written), f"The {what}")
    with exclusive(final.with_name(f".{final.name}.lock")), staged_directory(final, key, what, sources) as folder:
        yield folder


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file by rename: after a crash it holds the old content, the new content or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with at(path), _growing(partial_directory(path)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        partial_directory(path).replace(path)


def write_output(path: Path, data: bytes) -> None:
    """`write_bytes` of a file that a user named: it is noted beside it, and replaces nothing but our own, unchanged.

    Raises `OwnershipError`, before anything is written, where what stands there is not ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        require_own_files(path)
        noted = with_file(path, data)
        write_json(path.with_name(FILES), noted)
        write_bytes(path, data)
        if (settled := with_file(path, data)) != noted:
            write_json(path.with_name(FILES), settled)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process notes files in the folder."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a disk that knows no locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


@contextmanager
def _growing(partial: Path) -> Iterator[BinaryIO]:
    """The file that `write_bytes` renames, empty and locked.

    Every writer takes the same name, so that what a killed one left is used up by the next; the lock, which the kernel
    holds as long as the process, keeps two of them apart.
    """
    while True:
        file = partial.open("ab")
        with suppress(OSError):  # a disk that knows no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, partial):
            break
        file.close()  # the writer before this one has renamed it meanwhile
    try:
        file.truncate(0)
        yield file
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        file.close()


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_json(path: Path, value: Any) -> None:
    """Write JSON by rename, readable and with a final newline."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """JSON as `write_json` writes it."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file becomes a `CheckpointError` that names it."""
    try:
        return textfile.read_json(path)
    except TextError as error:
        hint = "; delete it so that it is made again" if path.is_file() else ""
        raise CheckpointError(f"{str(error).rstrip('.')}{hint}.") from None


@contextmanager
def staged_directory(final: Path, key: str, what: str = OUTPUT, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """Build `final` in a hidden sibling and publish it by rename when the body succeeds.

    The sibling outlives a crash: the next call with the same `key` continues in it, another key starts empty.
    An older `final` is replaced as a whole. An exception in the body publishes nothing. Raises `OwnershipError`, before
    anything is written, where `final` is not ours or one of `sources` lies there.
    """
    require_replaceable(final, *sources)
    partial, key_file = partial_directory(final), final.with_name(f".{final.name}.key")
    final.parent.mkdir(parents=True, exist_ok=True)
    if not key_file.exists() or key_file.read_bytes() != key.encode():
        discard(partial)
        write_bytes(key_file, key.encode())
    partial.mkdir(exist_ok=True)
    yield partial
    publish(partial, final, what)
    key_file.unlink(missing_ok=True)


def is_unfinished(final: Path) -> bool:
    """Whether `staged_directory` was interrupted before it had done all about `final`, which may be there already."""
    return final.with_name(f".{final.name}.key").exists()


def drop_unfinished(final: Path) -> None:
    """Remove what an interrupted `staged_directory` or `publish` of `final` left beside it."""
    discard(partial_directory(final))
    for left in leftovers(final.parent, final.name):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def leftovers(folder: Path, name: str = "") -> list[Path]:
    """Working files and directories of interrupted commands in `folder`: all, or those for what is called `name`."""
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir())
            if path.name.startswith((f".{name}.", f"..{name}.") if name else ".") and path.suffix in WORKING]


def partial_directory(final: Path) -> Path:
    """Where `staged_directory` builds `final`."""
    return final.with_name(f".{final.name}.partial")


def publish(ready: Path, final: Path, what: str = OUTPUT) -> None:
    """Flush a finished directory and rename it to `final`, replacing what stood there if that was ours, too."""
    require_replaceable(final)
    mark(ready, what)
    for path in ready.rglob("*"):
        if path.is_file():
            _flush(path)
    old = _doomed(final)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    ready.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete a directory of ours so that a reader sees it whole or not at all."""
    if path.exists():
        require_replaceable(path)
    discard(path)


def discard(path: Path) -> None:
    """Delete a working directory by renaming it first, so that nobody meets half of it, and what a kill left of one."""
    doomed = _doomed(path)
    shutil.rmtree(doomed, ignore_errors=True)
    if path.is_dir():
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _doomed(path: Path) -> Path:
    """The name of a directory that is about to be deleted; whatever has it may go."""
    return path.with_name(f".{path.name.lstrip('.')}.old")


def link_tree(source: Path, target: Path) -> None:
    """Mirror a directory by hard links, copying only where the disk cannot link."""
    shutil.copytree(source, target, copy_function=link_or_copy, dirs_exist_ok=True)


@contextmanager
def exclusive(lock: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the file lock `lock`; the kernel releases it when the process ends, however it ends.

    Raises `LockedError` naming the holder when another process has it, unless `wait`.
    """
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    holder = lock.with_name(f"{lock.name}.holder")
    held = FileLock(lock)
    try:
        held.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise LockedError(f"{lock.parent} is in use by {_holder(holder)}; wait for it to end.") from None
    try:
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock now. One that waits for it is not disturbed."""
    from filelock import FileLock, Timeout

    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def stop_holder(lock: Path) -> bool:
    """Ask the process that holds the lock to stop (SIGTERM), if it is one of this machine; whether it was asked."""
    if not is_held(lock):
        return False
    try:
        seen = json.loads(lock.with_name(f"{lock.name}.holder").read_bytes())
        if seen["host"] != socket.gethostname():
            return False
        os.kill(int(seen["pid"]), signal.SIGTERM)
    except (OSError, ValueError, KeyError):
        return False
    return True


def _holder(path: Path) -> str:
    try:
        seen = json.loads(path.read_bytes())
        return f"process {seen['pid']} on {seen['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Hard-link one file (what a symlink points to), or copy it where the disk cannot link."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
