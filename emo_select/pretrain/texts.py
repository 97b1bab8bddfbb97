"""Texts to be tokenized: files of several kinds and data sets on the Hub, as a stream of documents."""

from __future__ import annotations

import gzip
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from emo_select import textfile
from emo_select.errors import DataMissingError, SpecError, TokenDataError
from emo_select.ownership import FILES, MARKER
from emo_select.progress import say_once

HUB = "hf:"
GROUP_BYTES = 64_000_000
ROWS = 1024  # of a parquet file, read at a time
SUFFIXES = (".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet", ".txt", ".md", ".rst")
PLAIN = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Source:
    """One file, or one split of a data set on the Hub (`path` is None)."""

    name: str
    path: Path | None = None
    config: str | None = None
    split: str = "train"

    @property
    def size(self) -> int | None:
        """Bytes on disk, None on the Hub."""
        return self.path.stat().st_size if self.path else None

    @property
    def identity(self) -> list[Any]:
        """What tells it from another source, and from itself after a change."""
        stat = self.path.stat() if self.path else None
        return [self.name, self.config, self.split, stat and stat.st_size, stat and stat.st_mtime_ns]


def find_sources(names: list[str], config: str | None = None, split: str = "train") -> list[Source]:
    """Files, files below folders (in order of their names), and `hf:ID` for a data set on the Hub.

    Raises:
        TokenDataError: a name is nothing of these, or a folder has no texts. SpecError: a file of another kind.
    """
    found: list[Source] = []
    for name in names:
        path = Path(name).expanduser()
        if name.startswith(HUB):
            found.append(Source(name.removeprefix(HUB), None, config, split))
        elif path.is_dir():
            found += _below(path)
        elif path.exists():
            found.append(_file(path))
        else:
            hint = f"; a data set on the Hub is {HUB}{name}" if name.count("/") == 1 and name[0] not in "./~" else ""
            raise TokenDataError(f"There is no file or folder {name}{hint}.")
    return found


def grouped(sources: Sequence[Source]) -> list[list[int]]:
    """Numbers of consecutive sources that share token files: small files together, data sets on the Hub alone.

    A training cuts each token file into pieces and drops the rest, so a file per small text would lose all of it.
    """
    groups: list[list[int]] = []
    room = 0
    for number, source in enumerate(sources):
        size = source.size
        if size is None or room <= 0:
            groups.append([])
            room = GROUP_BYTES if size is not None else 0
        groups[-1].append(number)
        room -= size or 0
    return groups


def documents(source: Source, field: str = "text", *, lines: bool = False) -> Iterator[str]:
    """The texts of a source, in order. A plain text file is one document, or with `lines` one per line.

    Raises:
        TokenDataError: what is there is not text, or has no such field; names the place.
        DataMissingError: the Hub cannot be reached, or lacks the data set.
    """
    if source.path is None:
        yield from _from_hub(source, field)
    elif source.path.suffix == ".parquet":
        yield from _from_parquet(source.path, field)
    elif source.path.suffix in PLAIN:
        yield from _from_text(source.path, lines=lines)
    else:
        yield from _from_json(source.path, field)


def _below(folder: Path) -> list[Source]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _kind(path)
             and path.name not in (MARKER, FILES)]
    if not files:
        raise TokenDataError(f"{folder} holds no texts; files end in {', '.join(SUFFIXES)}.")
    return [Source(str(path), path) for path in files]


def _file(path: Path) -> Source:
    textfile.require_file(path, TokenDataError)
    if not _kind(path):
        raise SpecError(f"{path} is none of the files that texts come in; those end in {', '.join(SUFFIXES)}.")
    return Source(str(path), path)


def _kind(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def _from_text(path: Path, *, lines: bool) -> Iterator[str]:
    if lines:
        yield from (line for _, line in textfile.read_lines(path, TokenDataError))
    else:
        yield textfile.read_text(path, TokenDataError)


def _from_json(path: Path, field: str) -> Iterator[str]:
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                content = line.removeprefix(textfile.BOM) if number == 1 else line
                if content.strip():
                    yield _text_of(_row(content, where), field, where)
    except (OSError, EOFError) as error:
        raise TokenDataError(f"{path} cannot be read to its end ({error}); it is damaged or truncated.") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise TokenDataError(f"{path} is not a zstandard file, or a damaged one ({error}).") from None


def _row(line: bytes, where: str) -> Any:
    try:
        return textfile.parse_json(line.decode(), where, TokenDataError)
    except UnicodeDecodeError:
        raise TokenDataError(f"{where} is not UTF-8.") from None


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_zstandard().ZstdDecompressor().stream_reader(
            path.open("rb"), read_across_frames=True, closefd=True), 1 << 20)
    return path.open("rb")


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise SpecError("Reading .zst files needs the package zstandard; install it with `pip install "
                        "'emo-select[data]'`.") from None
    return zstandard


def _from_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _no_field(str(path), field, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _text_of({field: value}, field, f"{path}, row {row}")
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise TokenDataError(f"{path} is not a parquet file, or a damaged one ({reason}).") from None


def _from_hub(source: Source, field: str) -> Iterator[str]:
    say_once(f"Streaming {source.name} from the Hub.")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each of its attempts, twice
    for row, entry in enumerate(_streamed(source), 1):
        yield _text_of(entry, field, f"{source.name}, row {row}")


def _streamed(source: Source) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        yield from load_dataset(source.name, source.config, split=source.split, streaming=True,
                                trust_remote_code=False)
    except Exception as error:  # the types vary with the versions of four libraries
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise DataMissingError(f"The data set {source.name} (configuration {source.config or 'default'}, split "
                               f"{source.split}) cannot be streamed from the Hub ({reason}); check the names and the "
                               "network, or download its files and give their folder.") from None


def _text_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise TokenDataError(f"{where} is not an object with a field {field!r}.")
    if field not in row:
        raise _no_field(where, field, list(row))
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TokenDataError(f"{where} has {type(value).__name__} in {field!r}, not a text.")
    return value


def _no_field(where: str, field: str, known: list[str]) -> TokenDataError:
    return TokenDataError(f"{where} has no field {field!r}; name the one with the text by --field "
                          f"({', '.join(known[:8])}).")
