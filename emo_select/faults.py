"""The world's faults (a full disk, a folder that may not be written, a file that went away) as one sentence each.

`translated` is the only place that turns an `OSError` into a `StorageError`: around every command, and around every
function that the Python API offers.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from emo_select.errors import DiskSpaceError, SpecError, StorageError

FULL = (errno.ENOSPC, errno.EDQUOT)
_HIDDEN = (".partial", ".old", ".training")
_expected: ContextVar[tuple[int, ...]] = ContextVar("expected", default=())
_IN_RUST = re.compile(r"os error (\d+)")  # how the safetensors library words the same faults


@contextmanager
def translated(what: str = "", folder: Path | None = None, needed: int | None = None) -> Iterator[None]:
    """Turn an `OSError` of the body into a `StorageError` that names path, reason and remedy.

    Args:
        what: what the body writes, as the beginning of a sentence ("Writing the pruned checkpoint").
        folder: where it writes; for faults that do not say where they arose.
        needed: bytes that it takes, if known; else what was given to `expect` last, in the body or around it.
    """
    token = _expected.set(_expected.get() if needed is None else (needed,))
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as fault:
        raise StorageError(sentence(fault, what, folder, *_expected.get()[-1:])) from fault
    except Exception as fault:  # of the safetensors library, which has a class of its own for everything
        if type(fault).__name__ != "SafetensorError" or not (found := _IN_RUST.search(str(fault))):
            raise
        number = int(found[1])
        told = sentence(OSError(number, os.strerror(number)), what, folder, *_expected.get()[-1:])
        raise StorageError(told) from fault
    finally:
        _expected.reset(token)


def expect(needed: int) -> None:
    """Say how many bytes the work at hand takes, for the sentence that a full disk becomes."""
    _expected.set((*_expected.get(), needed))


@contextmanager
def at(path: Path, needed: int | None = None) -> Iterator[None]:
    """Add `path` to an `OSError` of the body that does not say where it arose, as those of open files do not.

    `needed` bytes are what the file takes; they are told where nobody knows of a whole that it is a part of.
    """
    try:
        yield
    except OSError as fault:
        if needed is not None and not _expected.get():
            expect(needed)
        if fault.filename is None and fault.errno is not None:  # one without a number would lose its words
            fault.filename = str(path)
        raise


def sentence(fault: OSError, what: str = "", folder: Path | None = None, needed: int | None = None) -> str:
    """What an `OSError` means to a person, with its path and, for a full disk, what was needed and what may go."""
    path = fault.filename2 or fault.filename or folder
    where = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else None
    begin = f"{what}: " if what else ""
    if fault.errno in FULL:
        return begin + _full(Path(where) if where else None, needed)
    return f"{begin}{where or 'A file'} cannot be used ({fault.strerror or fault})."


def require_writable(folder: Path, option: str = "--out", *, hint: str = "") -> None:
    """Raise before any work where `folder` could not be made or written; nothing is created.

    Raises:
        SpecError: a file is in the way, a name is too long, or the place may not be written. DiskSpaceError: no room.
    """
    hint = hint or f"choose another with {option}"
    try:
        there = existing_part(folder)
        if not there.is_dir():
            raise SpecError(f"Cannot write to {folder}: {there} is no folder; {hint}.")
        if not os.access(there, os.W_OK | os.X_OK):
            reason = "is read-only" if os.statvfs(there).f_flag & os.ST_RDONLY else "may not be written by this user"
            raise SpecError(f"Cannot write to {folder}: {there} {reason}; {hint}.")
        room = shutil.disk_usage(there)
        if room.total == 0:
            raise SpecError(f"Cannot write to {folder}: {there} is no place for files; {hint}.")
        if room.free == 0:
            raise DiskSpaceError(f"{_full(there, None).rstrip('.')}, or {hint}.")
    except OSError as fault:
        raise SpecError(f"Cannot write to {folder} ({fault.strerror}); {hint}.") from None


def existing_part(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())


def _full(place: Path | None, needed: int | None) -> str:
    if place is None:
        wanted = f" ({_size(needed)} needed)" if needed is not None else ""
        return f"The disk is full{wanted}; free some space and run the same command again."
    there = existing_part(place)
    free = f"{_size(shutil.disk_usage(there).free)} free"
    wanted = f"{_size(needed)} needed, {free}" if needed is not None else free
    leftover = _unfinished(there)
    hint = f"free some space and run the same command again; it goes on from {leftover}, which may be deleted " \
        "instead" if leftover else "free some space and run the same command again"
    return f"The disk of {place} is full ({wanted}); {hint}."


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1e3:.1f} kB"


def _unfinished(there: Path) -> Path | None:
    """What an interrupted command left in or around `there`, as the thing to delete first."""
    around = [part for part in (there, *there.parents) if part.name.startswith(".") and part.name.endswith(_HIDDEN)]
    if around:
        return around[-1]
    folder = there if there.is_dir() else there.parent
    return next((path for path in sorted(folder.glob(".*")) if path.name.endswith(_HIDDEN) and path.is_dir()), None)
