"""Where rows come from: rows in memory, a folder in the Hub's schema, the Hub's cache, or the Hub.

Only parquet and JSON lines are read; loading scripts of data sets are never run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from emo_select.checkpoint.sources import DATA_DIR_VARIABLE
from emo_select.errors import DataMissingError, TaskError
from emo_select.tasks.base import Row
from emo_select.textfile import read_json, read_json_lines, read_table, require_file

_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


@dataclass(frozen=True, eq=False)
class MemoryRows:
    """Rows given in the program: `{split: rows}`."""

    label: str
    splits: Mapping[str, Sequence[Row]]

    @property
    def available(self) -> bool:
        return True

    def rows(self, split: str) -> Sequence[Row]:
        return self.splits.get(split, ())

    def require(self, task: str) -> None:
        """Rows in memory are always there."""

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.splits, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class HubRows:
    """A data set of the Hub. `paths` are ids to try in turn, `config` its configuration ("default" where unnamed)."""

    paths: tuple[str, ...]
    config: str = "default"
    splits: tuple[str, ...] = ("train", "validation", "test")
    data_dir: Path | None = None

    @property
    def label(self) -> str:
        return self.paths[0] + ("" if self.config == "default" else f"/{self.config}")

    @property
    def available(self) -> bool:
        return all(self.locate(split) for split in self.splits)

    def locate(self, split: str) -> tuple[Path, ...]:
        """Files of a split in the data folder, else in the Hub's cache; empty where there are none."""
        for folder in self._folders():
            if files := split_files(folder, self.config, split):
                return files
        return ()

    def _folders(self) -> Iterator[Path]:
        folder = self.data_dir or os.environ.get(DATA_DIR_VARIABLE)
        if folder:
            yield from (Path(folder) / path for path in self.paths)
        from emo_select.tasks.hub import cached_snapshots

        for path in self.paths:
            yield from cached_snapshots(path)

    def require(self, task: str) -> None:
        missing = [split for split in self.splits if not self.locate(split)]
        if not missing:
            return
        from emo_select.tasks.hub import HubUnreachable, download_to_cache

        try:
            download_to_cache(self.paths, self.config, missing)
        except HubUnreachable as error:
            raise DataMissingError(
                f"The data set {self.label} ({', '.join(missing)}) is neither in the data folder nor in the Hub's "
                f"cache, and {error}; on a machine with network access run "
                f"`emo-select fetch --task {task} --to DIR`, then give --data-dir DIR."
            ) from error

    def rows(self, split: str) -> Sequence[Row]:
        files = self.locate(split)
        if not files:
            self.require(self.label)
            files = self.locate(split)
        return [row for file in files for row in recent_rows(file, file.stat().st_mtime_ns)]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.label.encode())
        for split in self.splits:
            for file in self.locate(split):
                digest.update(split.encode() + file_digest(file, file.stat().st_mtime_ns))
        return digest.hexdigest()


@lru_cache(maxsize=3)
def recent_rows(file: Path, changed_ns: int) -> Sequence[Row]:
    """The rows of a file, kept for the next task that reads it (the categories of MMLU-Pro share one file)."""
    return read_rows(file)


@lru_cache(maxsize=1024)
def file_digest(file: Path, changed_ns: int) -> bytes:
    """SHA-256 of a file's bytes; `changed_ns` makes the cache forget a file that changed."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


# ---- which files hold a split

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


def split_files(folder: Path, config: str, split: str) -> tuple[Path, ...]:
    """The files of one split of one configuration under a data set's folder, shards in order.

    Understood layouts: CONFIG/SPLIT.parquet (or .jsonl), CONFIG/SPLIT-00000-of-0000N.parquet,
    CONFIG/SPLIT/0000.parquet (the Hub's converted branch). The default configuration may also lie under data/ or
    directly in the folder, or be the only one there under another name. A split with a missing shard counts as absent.
    """
    bases = [folder / config] + ([folder / "data", folder] if config == "default" else [])
    for base in bases:
        if files := _files_of(base, split):
            return files
    if config != "default" or not folder.is_dir():
        return ()
    found = [files for base in sorted(folder.iterdir()) if base.is_dir() and (files := _files_of(base, split))]
    return found[0] if len(found) == 1 else ()


def _files_of(base: Path, split: str) -> tuple[Path, ...]:
    for file in (base / f"{split}{suffix}" for suffix in _SUFFIXES):
        if file.is_file():
            return (file,)
    shards = sorted(base.glob(f"{split}-*.parquet"))
    return _all_of_n(shards) or _from_zero(sorted((base / split).glob("*.parquet")))


def _all_of_n(files: Sequence[Path]) -> tuple[Path, ...]:
    """Shards named K-of-N, if all N are there."""
    found = [_SHARD.search(file.stem) for file in files]
    counts = {int(match[2]) for match in found if match}
    return tuple(files) if all(found) and counts == {len(files)} else ()


def _from_zero(files: Sequence[Path]) -> tuple[Path, ...]:
    """Shards numbered from 0 without a gap. They are downloaded last one first, so that no part looks complete."""
    numbers = [int(file.stem) if file.stem.isdigit() else -1 for file in files]
    return tuple(files) if numbers == list(range(len(files))) else ()


# ---- reading


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All rows of a parquet, JSON lines, JSON (a list), CSV or TSV file. Raises `TaskError` naming what is wrong."""
    readers = {".parquet": read_parquet, ".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_table,
               ".tsv": _read_table}
    if file.suffix not in readers:
        raise TaskError(f"{file} is not a .parquet, .jsonl, .json, .csv or .tsv file.")
    return readers[file.suffix](file)


def read_parquet(file: Path) -> list[dict[str, Any]]:
    """All rows of a parquet file. Raises `TaskError` where it is damaged or no file."""
    import pyarrow
    import pyarrow.parquet

    require_file(file, TaskError)
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.ParquetFile(file).read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise TaskError(f"{file} is not a complete parquet file ({error}); fetch it again.") from error
    return rows


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_json_lines(file, TaskError)]


def _read_json(file: Path) -> list[dict[str, Any]]:
    rows = read_json(file, TaskError)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TaskError(f"{file} is not a list of JSON objects; one object per line belongs in a .jsonl file.")
    return rows


def _read_table(file: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in read_table(file, TaskError)]
