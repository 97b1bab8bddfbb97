"""How files get to disk whole, and stay one writer's.

Every output appears by one rename: a reader sees the old file, the new file or none, never a part. Directories grow in
a hidden `.NAME.partial` beside their place, which survives a crash so that the stage that writes it can continue.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from emo_select import textfile
from emo_select.errors import CheckpointError, DiskSpaceError, LockedError, TextError
from emo_select.faults import at, existing_part, expect, require_writable
from emo_select.ownership import (
    FILES,
    OUTPUT,
    entry_of,
    is_ours,
    mark,
    require_own_files,
    require_replaceable,
    with_file,
)

WORKING = (".partial", ".old", ".key")  # ends of the names of what is under way
CACHE_VARIABLE = "EMO_SELECT_CACHE_DIR"


def cache_directory() -> Path:
    """Where what was computed is remembered: EMO_SELECT_CACHE_DIR, else below XDG_CACHE_HOME or ~/.cache.

    All of it can be deleted at any time; it only costs time.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(CACHE_VARIABLE) or home / "emo-select")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise `DiskSpaceError` unless the disk of `folder` has room for `needed` bytes of `what`."""
    require_writable(folder)
    expect(needed)
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
    with at(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _growing(partial_directory(path)) as file:
            _fill(file, data)
            partial_directory(path).replace(path)


def create_json(path: Path, value: Any) -> bool:
    """`write_json` of a file that must not be there yet; False, and nothing written, where it is.

    Of several processes exactly one succeeds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with at(path), _growing(partial_directory(path)) as file:  # nobody else writes the file meanwhile
        if path.exists():
            partial_directory(path).unlink()
            return False
        _fill(file, json_bytes(value))
        partial_directory(path).replace(path)
        return True


def _fill(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def write_output(path: Path, data: bytes) -> None:
    """`write_bytes` of a file in a user's folder: it is noted beside it, and replaces nothing but our own, unchanged.

    In a folder that is ours as a whole (`ownership.is_ours`) it needs no note. Raises `OwnershipError`, before anything
    is written, where what stands there is not ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_ours(path.parent):
        write_bytes(path, data)
    else:
        _put(path, entry_of(data), lambda: write_bytes(path, data))


def move_output(source: Path, path: Path) -> None:
    """`write_output` of what lies in another file of the same disk, which is moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _put(path, entry_of(source), lambda: source.replace(path))


def _put(path: Path, entry: dict[str, Any], write: Callable[[], object]) -> None:
    with _alone_in(path.parent):
        require_own_files(path)
        noted = with_file(path, entry)
        write_json(path.with_name(FILES), noted)
        write()
        if (settled := with_file(path, entry)) != noted:
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
    with at(partial):
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
