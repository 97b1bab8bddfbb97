"""SHA-256 of files, each large one read once: hashes are kept by path, size, time of change and inode.

The Hub's cache names a large file by its hash already. Others are remembered below the user's cache folder, one small
file each that appears by rename, so that processes and threads need not know of each other. A file that changed within
the last two seconds is not remembered: it could change again without its time stamp showing it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock

from emo_select.errors import CheckpointError
from emo_select.progress import track
from emo_select.storage import cache_directory, write_bytes

SMALL = 4 << 20  # bytes; less is read faster than looked up
PIECE = 8 << 20
MOST = 2048  # records; a large checkpoint has some two hundred files
SETTLED_NS = 2_000_000_000
WORKERS = min(4, os.cpu_count() or 1)
_SHA256 = re.compile("[0-9a-f]{64}")

Told = Callable[[int], None]
"""Called with the number of bytes read."""


def content_hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each file, in hexadecimal. What has to be read is shown as it goes.

    Raises `CheckpointError` where one is missing, is no file, or cannot be read.
    """
    found: dict[Path, str] = {}
    unread: dict[Path, int] = {}
    for path in paths:
        known, size = _known(path)
        if known is not None:
            found[path] = known
        else:
            unread[path] = size
    if not unread:
        return found
    lock = Lock()
    with track("Reading files to know them by content (GB)", round(sum(unread.values()) / 1e9, 3)) as bar:

        def told(count: int) -> None:
            with lock:
                bar.advance(count / 1e9)

        with ThreadPoolExecutor(WORKERS) as pool:  # hashing lets other threads run
            found |= zip(unread, pool.map(lambda path: _computed(path, told), unread), strict=True)
    return found


def content_hash(path: Path) -> str:
    """SHA-256 of one file, in hexadecimal."""
    return content_hashes([path])[path]


def _known(path: Path) -> tuple[str | None, int]:
    """The file's hash where it need not be read, and its size."""
    real = path.resolve()
    try:
        seen = real.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
    if not stat.S_ISREG(seen.st_mode):
        raise CheckpointError(f"{path} is not a file.")
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name) and path.is_symlink():
        return real.name, seen.st_size  # the Hub's cache
    return (_stored(real, seen) if seen.st_size >= SMALL else None), seen.st_size


def _computed(path: Path, told: Told) -> str:
    real = path.resolve()
    try:
        before = real.stat()
        found = _read(real, told)
        after = real.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
    settled = time.time_ns() - after.st_mtime_ns > SETTLED_NS
    if after.st_size >= SMALL and settled and _mark(before) == _mark(after):
        with suppress(OSError):  # a hash that cannot be kept only costs time
            write_bytes(_place(real), json.dumps([*_mark(after), found, str(real)]).encode())
            _tidy(_place(real).parent)
    return found


def _tidy(folder: Path) -> None:
    """Where records have become many, drop those of files that are gone, and then the oldest."""
    records = list(folder.glob("*.json"))
    if len(records) <= MOST:
        return
    alive = sorted(filter(_is_of_a_file, records), key=lambda record: record.stat().st_mtime)
    for record in {*records} - {*alive[-(MOST // 2):]}:
        record.unlink(missing_ok=True)


def _is_of_a_file(record: Path) -> bool:
    try:
        return Path(json.loads(record.read_bytes())[-1]).exists()
    except (OSError, ValueError, TypeError):
        return False


def _read(path: Path, told: Told) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(PIECE, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            told(count)
    return digest.hexdigest()


def _stored(path: Path, seen: os.stat_result) -> str | None:
    try:
        *mark, found, _ = json.loads(_place(path).read_bytes())
    except (OSError, ValueError, TypeError):
        return None
    return str(found) if mark == _mark(seen) else None


def _mark(seen: os.stat_result) -> list[int]:
    return [seen.st_size, seen.st_mtime_ns, seen.st_ino, seen.st_dev]


def _place(path: Path) -> Path:
    return cache_directory() / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
