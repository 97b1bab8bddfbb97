"""Remember what small files held, by path, size and time stamp, so that a large tree is parsed once."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic_core import from_json, to_json

from emo_select.storage import cache_directory, write_bytes

FORMAT = 5  # raise when the parsed content changes its shape


@dataclass
class FileCache:
    """Parsed content of the files below one root; written back on exit when something changed."""

    root: Path
    file: Path | None
    old: dict[str, Any] = field(default_factory=dict)
    new: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, *, enabled: bool = True) -> FileCache:
        """The cache of the tree at `root`; a damaged or outdated cache file counts as empty."""
        if not enabled:
            return cls(root, None)
        name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
        file = cache_directory() / f"tables-{name}.json"
        return cls(root, file, _stored(file))

    def read(self, name: str, parse: Callable[[bytes], dict[str, Any]]) -> dict[str, Any] | None:
        """`parse` of the bytes of the file `name` below the root, or None where there is none.

        Unchanged files are not opened.
        """
        path = f"{self.root}/{name}"
        try:
            found = os.stat(path)  # noqa: PTH116 - a Path per file is what a large tree would wait for
            mark = [found.st_size, found.st_mtime_ns]
            kept = self.old.get(name)
            if kept is None or kept[0] != mark:
                kept = [mark, parse(_content(path))]
        except FileNotFoundError:
            return None
        except OSError as error:
            return {"error": f"It cannot be read ({error.strerror})."}
        self.new[name] = kept
        content: dict[str, Any] = kept[1]
        return content

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.file is not None and self.new != self.old:
            with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
                write_bytes(self.file, to_json({"format": FORMAT, "files": self.new}))


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _stored(file: Path) -> dict[str, Any]:
    try:
        content = from_json(file.read_bytes())
        files = content["files"] if content["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}
