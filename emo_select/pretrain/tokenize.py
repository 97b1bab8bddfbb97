"""Texts become token files: several files at once, in chunks that an interrupted call does not make again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from emo_select.checkpoint.tokenizer import FILES, TokenizerFiles, tokenizer_folder
from emo_select.errors import EmoSelectError, SpecError, TokenDataError
from emo_select.pretrain.texts import Source, documents, grouped
from emo_select.pretrain.tokens import BYTES, MANIFEST, TOKENIZER, dtype_for, vocabulary_of
from emo_select.progress import Bar, say, track
from emo_select.storage import output_directory, read_json, write_json

FORMAT, MIX = 1, "mix.txt"
BATCH_CHARACTERS = 4_000_000  # of text in memory, per process
WATCH_S = 0.3  # a process sees that its parent has gone after so many seconds
BYTES_PER_TOKEN = 4  # of text, about; for estimates


@dataclass(frozen=True)
class Options:
    """How texts become tokens.

    Attributes:
        field: of JSON lines, parquet rows and Hub data sets that holds the text.
        label: in the mix.
        lines: whether each line of a plain text file is a document.
        limit: documents per source; None: all.
        chunk_tokens: a token file ends once it has at least this many.
        workers: processes; None: one per core.
    """

    field: str = "text"
    label: str = "text"
    lines: bool = False
    limit: int | None = None
    chunk_tokens: int = 1 << 28
    workers: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result."""
        return {name: value for name, value in asdict(self).items() if name != "workers"}


@dataclass(frozen=True)
class Job:
    """All that a process needs to know to tokenize some sources into token files of their own.

    `first` is the number of the first source.
    """

    number: int
    first: int
    sources: tuple[Source, ...]
    folder: Path
    tokenizer: Path
    eos: int
    dtype: str
    options: Options


def tokenize(sources: Sequence[Source], out: Path, tokenizer: str, options: Options | None = None) -> dict[str, Any]:
    """Write token files, `manifest.json`, `mix.txt` and the tokenizer to a folder; returns the manifest.

    A large source becomes `part-<n>-00000.npy`, `part-<n>-00001.npy`, …, small ones share such files. They hold raw
    little-endian numbers, the end-of-text token after each document; empty documents are left out. The text of special
    tokens in a document is text, never a special token. The folder appears by rename; a call that was interrupted goes
    on after the last whole file.

    Args:
        tokenizer: folder, Hub id or demo/NAME.

    Raises:
        ModelError, TokenDataError, SpecError, DiskSpaceError: see the sentence; nothing appears under `out`.
    """
    options = options or Options()
    vocabulary, files = vocabulary_of(tokenizer), TokenizerFiles(tokenizer_folder(tokenizer))
    dtype = dtype_for(vocabulary.size)
    identity = {"sources": [source.identity for source in sources], "options": options.identity,
                "tokenizer_sha256": files.sha256}
    if _is_done(out, identity):
        return dict(read_json(out / MANIFEST))
    needed = sum(source.size or 0 for source in sources) // BYTES_PER_TOKEN * BYTES[dtype]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    with output_directory(out, key, "token files", needed) as folder:
        if (folder / MANIFEST).exists():  # only the renaming was left to do
            return dict(read_json(folder / MANIFEST))
        jobs = [Job(number, group[0], tuple(sources[source] for source in group), folder, files.path, vocabulary.eos,
                    dtype, options) for number, group in enumerate(grouped(sources))]
        records = _run(jobs, options.workers)
        manifest = _manifest(sources, records, options, identity) | {
            "tokenizer": vocabulary.name, "tokenizer_sha256": files.sha256, "dtype": dtype,
            "vocab_size": vocabulary.size, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.pad}
        _finish(folder, manifest, files)
    return manifest


def estimate(sources: Sequence[Source], tokenizer: str, new_size: int | None = None) -> dict[str, Any]:
    """What would be read and, about, written; reads nothing but sizes. `new_size`: of a tokenizer yet to be made."""
    vocab_size = new_size or vocabulary_of(tokenizer, download=False).size
    known = [source.size for source in sources if source.size is not None]
    tokens, dtype = sum(known) // BYTES_PER_TOKEN, dtype_for(vocab_size)
    return {"sources": len(sources), "hub_sources": len(sources) - len(known), "text_bytes": sum(known),
            "tokens_about": tokens, "bytes_about": tokens * BYTES[dtype], "vocab_size": vocab_size, "dtype": dtype}


def _is_done(out: Path, identity: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    recorded = read_json(out / MANIFEST).get("made_from") if (out / MANIFEST).is_file() else None
    if recorded == json.loads(json.dumps(identity)):
        say(f"{out} holds these tokens already; nothing to do.")
        return True
    raise SpecError(f"{out} is already there and holds something else; choose another --out, or delete it.")


def _run(jobs: Sequence[Job], workers: int | None) -> list[list[dict[str, Any]]]:
    """The records of each job's token files. Several processes only where there are several jobs."""
    count = min(workers or os.cpu_count() or 1, len(jobs))
    unit, total = ("token files", len(jobs)) if count > 1 else ("documents", None)
    with track(f"Tokenizing ({unit})", total) as bar:
        if count == 1:
            return [_tokenize(job, bar) for job in jobs]
        others = set(active_children())
        pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_in_worker,
                                   initargs=(os.getpid(),))
        try:
            return _collected(pool, jobs, bar)
        except BrokenProcessPool:
            raise EmoSelectError("A process that tokenized was killed, perhaps because memory ran out; the same "
                                 "command goes on after the last whole file; give it fewer --workers.") from None
        except BaseException:
            for child in set(active_children()) - others:  # they would first finish what they have begun
                child.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _collected(pool: ProcessPoolExecutor, jobs: Sequence[Job], bar: Bar) -> list[list[dict[str, Any]]]:
    futures: dict[Future[list[dict[str, Any]]], Job] = {pool.submit(_tokenize, job): job for job in jobs}
    records: dict[int, list[dict[str, Any]]] = {}
    for future in as_completed(futures):
        job = futures[future]
        records[job.number] = future.result()
        tokens = sum(entry["tokens"] for found in records.values() for entry in found)
        bar.advance(1, f"{tokens / 1e6:.1f} M tokens")
    return [records[job.number] for job in jobs]


def _in_worker(parent: int) -> None:
    """Processes share the cores, leave Ctrl-C to their parent, and end with it, however it ends."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(1)


def _tokenize(job: Job, bar: Bar | None = None) -> list[dict[str, Any]]:
    """Make the token files of a job that are not there yet; returns the records of all."""
    records = _finished(job)
    if records and records[-1]["last"]:
        return records
    read = sum(entry["read"] for entry in records)
    rest = islice(_texts(job), read, None)
    encoder = _Encoder(job.tokenizer)
    while not records or not records[-1]["last"]:
        records.append(_write_chunk(job, len(records), rest, encoder, bar))
    return records


def _texts(job: Job) -> Iterator[str]:
    for source in job.sources:
        yield from islice(documents(source, job.options.field, lines=job.options.lines), job.options.limit)


def _finished(job: Job) -> list[dict[str, Any]]:
    """Records of the files that an interrupted call has made; a file without its record is made again."""
    found: list[dict[str, Any]] = []
    while (path := _record_path(job, len(found))).exists():
        found.append(read_json(path))
    return found


def _record_path(job: Job, chunk: int) -> Path:
    return job.folder / f".part-{job.number:05d}-{chunk:05d}.json"


def _write_chunk(job: Job, chunk: int, texts: Iterator[str], encoder: _Encoder, bar: Bar | None) -> dict[str, Any]:
    """One token file and its record, which comes last. `read` counts documents taken, `documents` those written."""
    import numpy as np

    name = f"part-{job.number:05d}-{chunk:05d}.npy"
    digest, tokens, read, written, last = hashlib.sha256(), 0, 0, 0, False
    stored = np.dtype(job.dtype).newbyteorder("<")
    with (job.folder / f".{name}.partial").open("wb") as file:
        while tokens < job.options.chunk_tokens and not last:
            batch = list(_batch(texts))
            last = not batch
            kept = [text for text in batch if text]
            numbers = [number for ids in encoder.encode_batch(kept) for number in (*ids, job.eos)]
            data = np.array(numbers, dtype=stored).tobytes()
            file.write(data)
            digest.update(data)
            tokens, read, written = tokens + len(numbers), read + len(batch), written + len(kept)
            if bar is not None:
                bar.advance(len(batch), f"{tokens / 1e6:.1f} M tokens")
        file.flush()
        os.fsync(file.fileno())
    (job.folder / f".{name}.partial").replace(job.folder / name)
    record = {"file": name, "label": job.options.label, "tokens": tokens, "documents": written, "read": read,
              "bytes": tokens * stored.itemsize, "sha256": digest.hexdigest(),
              "sources": [job.first, job.first + len(job.sources)],
              "last": last}
    write_json(_record_path(job, chunk), record)
    return record


def _batch(texts: Iterator[str]) -> Iterator[str]:
    size = 0
    for text in texts:
        yield text
        size += len(text) + 1
        if size >= BATCH_CHARACTERS:
            return


class _Encoder:
    """A tokenizer that knows no special token in a text and adds none."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise TokenDataError(f"{path} cannot be used as a tokenizer ({str(error).splitlines()[0]}).") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode_batch(self, texts: list[str]) -> Iterator[list[int]]:
        """The numbers of each text."""
        return (found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))


def _manifest(sources: Sequence[Source], records: Sequence[Sequence[dict[str, Any]]], options: Options,
              identity: dict[str, Any]) -> dict[str, Any]:
    files = [{key: value for key, value in entry.items() if key not in ("read", "last")}
             for found in records for entry in found if entry["tokens"]]
    if not files:
        raise TokenDataError("The sources hold no text at all, so there is nothing to write; check --field.")
    empty = sum(entry["read"] - entry["documents"] for found in records for entry in found)
    return {"format": FORMAT, "tokens": sum(entry["tokens"] for entry in files),
            "documents": sum(entry["documents"] for entry in files), "empty_documents": empty,
            "files": files, "made_from": identity}


def _finish(folder: Path, manifest: dict[str, Any], tokenizer: TokenizerFiles) -> None:
    """Leave in the folder what belongs there: token files, manifest, mix, tokenizer."""
    (folder / TOKENIZER).mkdir(exist_ok=True)
    for name in FILES:
        if (tokenizer.folder / name).is_file():
            shutil.copyfile(tokenizer.folder / name, folder / TOKENIZER / name)
    lines = [f"{entry['label']},{entry['file']}\n" for entry in manifest["files"]]
    (folder / MIX).write_text("".join(lines))
    write_json(folder / MANIFEST, manifest)
    named = {MANIFEST, MIX, *(entry["file"] for entry in manifest["files"])}
    for path in folder.iterdir():
        if path.is_file() and path.name not in named:
            path.unlink()
