"""Texts for an analysis, from wherever they are: `read_corpus` turns what a user typed into documents.

- a folder of token files (`.npy`), a published mix (`.txt`) or composition (`.json`): see `tokenfiles`;
- `.jsonl`, `.json`, `.parquet`, `.txt`, plain or compressed (`.gz`, `.zst`), or a folder of them, local or at any URL
  that fsspec knows, such as s3://… ; rows have `text`, and `topic`, `format` and `source` where they are known;
- a data set of the Hub (`hf:allenai/OLMoE-mix-0924`), whose files are streamed; WebOrganizer's corpora bring topics and
  formats in arrays beside their documents;
- `task:NAME`, the selection split of a task, or `demo`.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emo_select import progress
from emo_select.analysis.corpus import LABEL_KEYS, Corpus, Reservoir, Sampling, label_key, tokenised
from emo_select.analysis.tokenfiles import (
    Published,
    filesystem,
    published_sample,
    read_mix,
    sample,
    token_files_in,
    topic_mix,
    unreachable,
)
from emo_select.errors import SpecError
from emo_select.textfile import BOM, parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = (".jsonl", ".json", ".parquet", ".txt")
PACKED = (".gz", ".zst", ".zstd")
TASK, HUB = "task:", ("hf:", "hub:")
DEMO_DOCUMENTS = 55  # of each domain
# WebOrganizer's classes, by the numbers in its arrays (published with its classifiers).
TOPICS = ("adult_content", "art_and_design", "software_development", "crime_and_law", "education_and_jobs",
          "electronics_and_hardware", "entertainment", "social_life", "fashion_and_beauty", "finance_and_business",
          "food_and_dining", "games", "health", "history_and_geography", "home_and_hobbies", "industrial",
          "literature", "politics", "religion", "science_math_and_technology", "software", "sports_and_fitness",
          "transportation", "travel_and_tourism")
FORMATS = ("academic_writing", "content_listing", "creative_writing", "customer_support", "comment_section", "faq",
           "truncated", "knowledge_article", "legal_notices", "listicle", "news_article", "nonfiction_writing",
           "about_org", "news_org", "about_pers", "personal_blog", "product_page", "q_and_a_forum", "spam_ads",
           "structured_data", "documentation", "audio_transcript", "tutorial", "user_review")
DOMAINS = {"topic": ("domains_topics", TOPICS), "format": ("domains_formats", FORMATS)}


@dataclass(frozen=True)
class Texts:
    """What a user asked for.

    Attributes:
        source: see the module's text.
        sampling: how many documents.
        published: the published sampler's settings, to use it for token files.
        bucket: stands for s3://ai2-llm in published lists of files.
        eos: id that ends a document in token files; None takes the model's.
        label: which label to go by; None takes topic, format or source, the first that documents have.
        num_examples, seed: the draw from a task.
        data_dir: folder of datasets for machines without network.
    """

    source: str
    sampling: Sampling = field(default_factory=Sampling)
    published: Published | None = None
    bucket: str | None = None
    eos: int | None = None
    label: str | None = None
    num_examples: int | None = None
    data_dir: str | None = None

    def as_data(self) -> dict[str, Any]:
        """What is recorded beside the documents."""
        found = asdict(self)
        return {key: found[key] for key in ("source", "label", "bucket") if found[key] is not None}


@dataclass(frozen=True)
class TextRow:
    """A text with its labels and the place where it was found."""

    text: str
    labels: Mapping[str, str]
    name: str


def read_corpus(texts: Texts, tokenizer: PreTrainedTokenizerBase | None, eos: int | None) -> Corpus:
    """The documents that `texts` asks for, as ids of `tokenizer` (not needed for token files).

    Raises:
        SpecError, TaskError, DataMissingError: the source does not exist, cannot be read, or has no text.
    """
    if _is_token_files(texts.source):
        return _from_tokens(texts, eos if texts.eos is None else texts.eos)
    if texts.published is not None:
        raise SpecError(f"{texts.source} holds text; --published-sampling draws from token files (.npy).")
    if tokenizer is None:
        raise SpecError(f"{texts.source} holds text, and the model has no tokenizer; give a folder that has one.")
    rows = _draw(texts)
    ids = tokenised([row.text for row in rows], tokenizer, texts.sampling)
    kept = [i for i, one in enumerate(ids) if len(one) >= texts.sampling.min_tokens]
    labels = [rows[i].labels for i in kept]
    about = {**texts.as_data(), "sampling": "per label", **vars(texts.sampling)}
    return Corpus([ids[i] for i in kept], labels, [rows[i].name for i in kept], about,
                  label_key(labels, texts.label)).require()


def _is_token_files(source: str) -> bool:
    """Whether `source` is a folder of `.npy` files and no rows, a composition, or a list of `label,path` lines."""
    if source == "demo" or source.startswith((TASK, *HUB)):
        return False
    system, path = filesystem(source)
    try:
        if not system.exists(path):
            raise SpecError(f"There are no texts at {source}; give a file, a folder, hf:DATASET, task:NAME or demo.")
        if system.isdir(path):
            return not row_files(source) and bool(token_files_in(source))
        head = system.cat_file(path, start=0, end=4096) if source.endswith((".json", ".txt")) else b""
    except SpecError:
        raise
    except Exception as error:
        raise unreachable(source, error) from None
    if source.endswith(".json"):
        return b'"all_files"' in head
    lines = [line for line in head.splitlines()[:5] if line.strip() and not line.startswith(b"#")]
    return bool(lines) and all(b"," in line and line.rstrip().endswith(b".npy") for line in lines[:1])


def _from_tokens(texts: Texts, eos: int | None) -> Corpus:
    if eos is None:
        raise SpecError("The model does not say which token ends a document; give its id with --eos-id.")
    published = texts.published
    mix = topic_mix(texts.source) if published and published.evenly and not texts.source.endswith((".json", ".txt")) \
        else read_mix(texts.source, texts.bucket)
    if published is not None:
        return published_sample(mix, published, eos, texts.as_data())
    return sample(mix, texts.sampling, eos, texts.as_data())


def _draw(texts: Texts) -> list[TextRow]:
    pool = Reservoir(texts.sampling.per_label, texts.sampling.seed)
    with progress.track("Reading texts") as bar:
        for number, row in enumerate(_rows(texts)):
            if number >= texts.sampling.scan:
                progress.say(f"Read the first {number:,} documents; --scan reads more.")
                break
            pool.add(row.labels.get(texts.label or "", "") or _any_label(row.labels), row)
            bar.advance(1)
    rows: list[TextRow] = pool.rows()
    if not rows:
        raise SpecError(f"{texts.source} has no texts; give others with --texts.")
    return rows


def _any_label(labels: Mapping[str, str]) -> str:
    return next((labels[key] for key in LABEL_KEYS if labels.get(key)), "")


def _rows(texts: Texts) -> Iterator[TextRow]:
    if texts.source == "demo":
        yield from _demo_rows()
    elif texts.source.startswith(TASK):
        yield from _task_rows(texts)
    else:
        source = texts.source
        for prefix in HUB:
            source = f"hf://datasets/{source.removeprefix(prefix)}" if source.startswith(prefix) else source
        yield from _file_rows(source)


# ---- tasks and the demo


def _task_rows(texts: Texts) -> Iterator[TextRow]:
    from emo_select.experts.calibration import SPLIT, draw
    from emo_select.tasks import get_tasks

    for task in get_tasks(texts.source.removeprefix(TASK).split(","), texts.data_dir):
        task.require_data()
        examples = list(task.examples(SPLIT))
        for i in draw(len(examples), texts.num_examples, 0):
            labels = {"source": task.name, **({"topic": examples[i].group} if examples[i].group else {})}
            yield TextRow(examples[i].text, labels, f"{task.name}/{i}")


def _demo_rows() -> Iterator[TextRow]:
    from emo_select.demo.domains import DOMAINS, documents

    for domain in DOMAINS:
        for number, text in enumerate(documents(domain, DEMO_DOCUMENTS)):
            yield TextRow(text, {"source": domain}, f"{domain}/{number}")


# ---- files of rows


def row_files(source: str) -> list[str]:
    """Paths of the files of rows below a folder (or the file itself), on its file system."""
    system, path = filesystem(source)
    try:
        found = sorted(system.find(path)) if system.isdir(path) else [path]
    except Exception as error:
        raise unreachable(source, error) from None
    documents = [file for file in found if "/documents/" in file and kind_of(file)]
    return documents or [file for file in found if kind_of(file)]


def kind_of(path: str) -> str:
    """`.jsonl` for x.jsonl.zst; "" for a file that holds no rows."""
    bare = path
    for suffix in PACKED:
        bare = bare.removesuffix(suffix)
    return next((kind for kind in ROWS if bare.endswith(kind)), "")


def _file_rows(source: str) -> Iterator[TextRow]:
    files = row_files(source)
    if not files:
        raise SpecError(f"{source} is no file of texts; use {', '.join(ROWS)} (also .gz, .zst), a folder of them, "
                        "token files, hf:DATASET, task:NAME or demo.")
    shared = _shared_folder(files)
    readers = [_one_file(source, path, _folder_label(path, shared)) for path in files]
    while readers:  # a document of each file in turn, so that a bounded look sees all of them
        for reader in list(readers):
            row = next(reader, None)
            if row is None:
                readers.remove(reader)
            else:
                yield row


def _one_file(source: str, path: str, label: str) -> Iterator[TextRow]:
    system, _ = filesystem(source)
    domains = _domains(system, path)
    reader = {".parquet": _parquet, ".txt": _lines}.get(kind_of(path), _json_lines)
    for number, row in enumerate(reader(system, path)):
        text = row.get("text")
        if not isinstance(text, str):
            raise SpecError(f"Row {number + 1} of {path} has no `text`.")
        labels = {"source": label} | {key: str(row[key]) for key in LABEL_KEYS if isinstance(row.get(key), str)}
        labels |= {key: names[int(numbers[number])] for key, (numbers, names) in domains.items()}
        yield TextRow(text, labels, f"{path.rpartition('/')[2]}:{number + 1}")


def _shared_folder(files: Sequence[str]) -> int:
    """How many leading folders all files have in common."""
    parts = [file.split("/")[:-1] for file in files]
    return next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1),
                min(map(len, parts)))


def _folder_label(path: str, shared: int) -> str:
    """The first folder in which files differ, else the file's name without its endings."""
    parts = path.split("/")
    return parts[shared] if len(parts) > shared + 1 else parts[-1].split(".")[0]


def _domains(system: Any, path: str) -> dict[str, tuple[NDArray[Any], Sequence[str]]]:
    """WebOrganizer's arrays beside `documents/X.jsonl.zst`: `domains_topics/X__choice.npy`, and formats alike."""
    folder, slash, name = path.rpartition("/documents/")
    if not slash:
        return {}
    stem = name.removesuffix(".zst").removesuffix(".gz").removesuffix(".jsonl")
    found: dict[str, tuple[NDArray[Any], Sequence[str]]] = {}
    for key, (place, names) in DOMAINS.items():
        file = f"{folder}/{place}/{stem}__choice.npy"
        if system.exists(file):
            found[key] = (np.load(io.BytesIO(system.cat_file(file)), allow_pickle=False), names)
    return found


def _json_lines(system: Any, path: str) -> Iterator[Mapping[str, Any]]:
    for number, line in _text_lines(system, path):
        row = parse_json(line, f"{path}, line {number}", SpecError)
        if not isinstance(row, dict):
            raise SpecError(f"{path}, line {number} is not a JSON object.")
        yield row


def _lines(system: Any, path: str) -> Iterator[Mapping[str, Any]]:
    for _, line in _text_lines(system, path):
        yield {"text": line}


def _text_lines(system: Any, path: str) -> Iterator[tuple[int, str]]:
    """(number, line) of every line that is not blank, as a stream; only a newline ends a line."""
    try:
        with system.open(path, "rb") as raw:
            for number, line in enumerate(_unpacked(raw, path), 1):
                text = line.removeprefix(BOM if number == 1 else b"").decode().rstrip("\r\n")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError:
        raise SpecError(f"{path} is not UTF-8 text; convert the file to UTF-8.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise unreachable(path, error) from None


def _unpacked(raw: Any, path: str) -> Any:
    import pyarrow

    if path.endswith((".zst", ".zstd")):
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))
    return gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw


def _parquet(system: Any, path: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with system.open(path, "rb") as raw:
            file = pyarrow.parquet.ParquetFile(raw)
            columns = [name for name in ("text", *LABEL_KEYS) if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise SpecError(f"{path} is not a parquet file ({error}).") from None
