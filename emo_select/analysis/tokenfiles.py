"""Token files as pretraining leaves them: headerless little-endian uint32, each document ending with EOS.

A `Mix` says which files belong to which label. Files may lie anywhere that fsspec reaches; only the bytes that are
needed are read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emo_select import progress
from emo_select.analysis.corpus import SEED, Corpus, Sampling, label_key
from emo_select.errors import SpecError
from emo_select.storage import read_json

TOKEN_BYTES = 4
PUBLISHED_BUCKET = "s3://ai2-llm"
TOKENIZER = "allenai/dolma2-tokenizer"
WINDOW_BYTES = 256 << 10
PER_WINDOW = 20  # documents of one window: neighbours in a file are alike
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class TokenFile:
    """A file and its size in bytes."""

    url: str
    size: int


@dataclass(frozen=True)
class Published:
    """The published sampler's settings.

    `target_tokens` over all sources by their share of bytes, or divided evenly among topics with `evenly`. With
    `doc_tokens` (0: documents whole) eight times as much is drawn, since most of each document is then cut off.
    """

    target_tokens: int = 1_000_000
    doc_tokens: int = 100
    min_length: int = 32
    max_length: int = 2048
    seed: int = SEED
    chunk_bytes: int = 2_000_000
    attempts: int = 200
    evenly: bool = False


@dataclass(frozen=True)
class Mix:
    """Files per label, and each label's share of the mix."""

    files: Mapping[str, Sequence[TokenFile]]
    fractions: Mapping[str, float]

    @classmethod
    def of(cls, files: Mapping[str, Sequence[TokenFile]]) -> Mix:
        """Shares by bytes, to six decimals."""
        sizes = {label: sum(file.size for file in listed) for label, listed in files.items()}
        total = sum(sizes.values())
        if not total:
            raise SpecError("The token files of the mix are empty or missing; check the folder and its labels.")
        return cls(files, {label: round(size / total, 6) for label, size in sizes.items()})

    def by_share(self) -> list[str]:
        """Labels, largest share first."""
        return sorted(self.fractions, key=lambda label: -self.fractions[label])


# ---- reading


def filesystem(url: str) -> tuple[Any, str]:
    """An fsspec file system and the path on it. SpecError where its package is missing or access is refused."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise SpecError(f"{url} cannot be opened ({_first_line(error)}).") from None
    return system, str(path)


def unreachable(url: str, error: Exception) -> SpecError:
    """The error for a file that cannot be read."""
    return SpecError(f"{url} cannot be read ({_first_line(error)}); check the path and the credentials.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_tokens(file: TokenFile, offset: int, count: int) -> Tokens:
    """The tokens in `count` bytes from `offset` on, as far as the file goes."""
    system, path = filesystem(file.url)
    try:
        raw = system.cat_file(path, start=offset, end=min(offset + count, file.size))
    except Exception as error:
        raise unreachable(file.url, error) from None
    return np.frombuffer(raw[:len(raw) // TOKEN_BYTES * TOKEN_BYTES], dtype="<u4").astype(np.int32)


def split_documents(tokens: Tokens, eos: int) -> list[tuple[int, Tokens]]:
    """(first token, document with its EOS) for every document that ends within `tokens`."""
    ends = np.flatnonzero(tokens == eos) + 1
    starts = [0, *ends[:-1]]
    return [(int(start), tokens[start:end]) for start, end in zip(starts, ends, strict=False)]


# ---- which files


def read_mix(source: str, bucket: str | None = None) -> Mix:
    """A mix from a folder of token files, a published composition (.json) or a list of `label,path` lines (.txt).

    `bucket` stands for s3://ai2-llm in the paths of the latter two.

    Raises:
        SpecError: no such file, no token files, or a line without a label.
    """
    if source.endswith(".json"):
        return _from_composition(Path(source), bucket)
    if source.endswith(".txt"):
        return _sized(_listed(Path(source), bucket))
    return Mix.of(_in_folder(source))


def token_files_in(source: str) -> list[str]:
    """Paths of the token files below a folder, on its file system."""
    system, path = filesystem(source)
    try:
        return [found for found in sorted(system.find(path)) if found.endswith(".npy")]
    except Exception as error:
        raise unreachable(source, error) from None


def composition(mix: Mix) -> dict[str, Any]:
    """`pretraining_mix.json` as published, where est_tokens counts two bytes per token: twice the true number."""
    sources = {label: {
        "num_files": len(mix.files[label]),
        "est_tokens": sum(file.size for file in mix.files[label]) // 2,
        "fraction": mix.fractions[label],
        "all_files": [file.url for file in mix.files[label]],
    } for label in mix.by_share()}
    return {"grand_total_est_tokens": sum(one["est_tokens"] for one in sources.values()), "sources": sources}


def topic_mix(source: str) -> Mix:
    """Topics alike, each from the files of its highest `vigintile_NNNN` folder: `<source>/<topic>/<vigintile>/*.npy`.

    SpecError where the folder is not laid out so.
    """
    system, root = filesystem(source)
    found: dict[str, dict[str, list[TokenFile]]] = {}
    for path in token_files_in(source):
        parts = path.removeprefix(root).strip("/").split("/")
        if len(parts) == 3 and parts[1].startswith("vigintile_"):
            file = TokenFile(system.unstrip_protocol(path), int(system.size(path)))
            found.setdefault(parts[0], {}).setdefault(parts[1], []).append(file)
    if not found:
        raise SpecError(f"{source} is not laid out as <topic>/vigintile_NNNN/*.npy; give another folder with --texts.")
    share = round(1 / len(found), 6)
    return Mix({topic: bins[max(bins)] for topic, bins in sorted(found.items())}, dict.fromkeys(sorted(found), share))


def _in_folder(source: str) -> dict[str, list[TokenFile]]:
    """Labels are the folders right below `source`; files that lie in it belong to a label of its name."""
    system, root = filesystem(source)
    files: dict[str, list[TokenFile]] = {}
    for path in token_files_in(source):
        parts = path.removeprefix(root).strip("/").split("/")
        label = parts[0] if len(parts) > 1 else root.rstrip("/").rpartition("/")[2]
        files.setdefault(label, []).append(TokenFile(system.unstrip_protocol(path), int(system.size(path))))
    if not files:
        raise SpecError(f"{source} holds no token files (.npy); give another folder with --texts.")
    return files


def _listed(file: Path, bucket: str | None) -> dict[str, list[str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"The mix {file} cannot be read ({_first_line(error)}).") from None
    urls: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        label, comma, path = line.partition(",")
        if not comma:
            raise SpecError(f"Line {number} of {file} is not `label,path`.")
        path = path.strip().replace("{TOKENIZER}", TOKENIZER)
        urls.setdefault(label.strip(), []).append(_moved(f"{PUBLISHED_BUCKET}/{path}", bucket))
    return urls


def _from_composition(file: Path, bucket: str | None) -> Mix:
    try:
        sources = read_json(file)["sources"]
        urls = {label: [_moved(url, bucket) for url in entry["all_files"]] for label, entry in sources.items()}
        fractions = {label: float(entry["fraction"]) for label, entry in sources.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SpecError(f"{file} is not the composition of a mix ({error}).") from None
    return Mix(_sized(urls).files, fractions)


def _moved(url: str, bucket: str | None) -> str:
    return url if bucket is None else url.replace(PUBLISHED_BUCKET, bucket.rstrip("/"), 1)


def _sized(urls: Mapping[str, Sequence[str]]) -> Mix:
    with progress.track("Looking up file sizes", total=sum(map(len, urls.values()))) as bar:
        return Mix.of({label: list(_sizes(listed, bar)) for label, listed in urls.items()})


def _sizes(urls: Sequence[str], bar: progress.Bar) -> Iterator[TokenFile]:
    """Files with their sizes, those of one folder together as the published sampler has them."""
    folders: dict[str, list[str]] = {}
    for url in urls:
        folders.setdefault(url.rpartition("/")[0], []).append(url)
    for url in (url for listed in folders.values() for url in listed):
        system, path = filesystem(url)
        try:
            yield TokenFile(url, int(system.size(path)))
        except Exception as error:
            raise unreachable(url, error) from None
        bar.advance(1)


# ---- the published sampler


def published_sample(mix: Mix, settings: Published, eos: int, about: Mapping[str, Any] | None = None) -> Corpus:
    """The published sampler, document for document.

    Each label has its own generator with the same seed. It draws a file by size and an offset, reads a chunk, and
    takes its documents until the label's budget is met; the last one is taken whole, so the target is no cap. As
    published, the first *accepted* document behind an offset is left out even where the cut one was too short
    already, a document can come twice, and files shorter than a chunk are always read from the start.
    """
    token_ids: list[Tokens] = []
    labels: list[dict[str, str]] = []
    for label, budget in _budgets(mix, settings):
        found = _published_label(mix.files[label], budget, settings, eos)
        token_ids += [ids[:settings.doc_tokens or None] for ids in found]
        labels += [{"source": label}] * len(found)
    told = {"sampling": "published", **vars(settings), "eos": eos, **(about or {})}
    return Corpus(token_ids, labels, about=told).require()


def _budgets(mix: Mix, settings: Published) -> list[tuple[str, int]]:
    if settings.evenly:
        return [(label, settings.target_tokens // len(mix.files)) for label in sorted(mix.files)]
    target = settings.target_tokens * (8 if settings.doc_tokens else 1)
    budgets = [(label, int(mix.fractions[label] * target)) for label in mix.by_share()]
    return [(label, budget) for label, budget in budgets if budget >= settings.min_length]


def _published_label(files: Sequence[TokenFile], budget: int, settings: Published, eos: int) -> list[Tokens]:
    pool = [file for file in files if file.size > settings.chunk_bytes] or [file for file in files if file.size]
    if not pool:
        return []
    total = sum(file.size for file in pool)
    draw, found, taken = random.Random(settings.seed), list[Tokens](), 0
    for _ in range(settings.attempts):
        if taken >= budget:
            break
        file = draw.choices(pool, weights=[file.size / total for file in pool])[0]
        offset = draw.randint(0, max(0, file.size - settings.chunk_bytes)) // TOKEN_BYTES * TOKEN_BYTES
        for ids in _published_chunk(file, offset, settings, eos):
            if taken >= budget:
                break
            found.append(ids)
            taken += len(ids)
    return found


def _published_chunk(file: TokenFile, offset: int, settings: Published, eos: int) -> list[Tokens]:
    documents = split_documents(read_tokens(file, offset, settings.chunk_bytes), eos)
    accepted = [ids for _, ids in documents if settings.min_length <= len(ids) <= settings.max_length]
    return accepted[1:] if offset else accepted


# ---- our sampler


def sample(mix: Mix, sampling: Sampling, eos: int, about: Mapping[str, Any] | None = None) -> Corpus:
    """At most `sampling.per_label` documents of each label, none twice, from windows all over its files."""
    token_ids: list[Tokens] = []
    labels: list[dict[str, str]] = []
    names: list[str] = []
    with progress.track("Reading token files", total=len(mix.files)) as bar:
        for label in mix.by_share():
            for name, ids in _sample_label(mix.files[label], sampling, eos, label):
                token_ids.append(sampling.cut(ids))
                labels.append({"source": label})
                names.append(name)
            bar.advance(1)
    told = {"sampling": "per label", **vars(sampling), "eos": eos, **(about or {})}
    return Corpus(token_ids, labels, names, told, label_key(labels, None)).require()


def _sample_label(files: Sequence[TokenFile], sampling: Sampling, eos: int, label: str) -> list[tuple[str, Tokens]]:
    draw = random.Random(f"{sampling.seed}/{label}")
    windows = [(file, start) for file in files for start in range(0, file.size, WINDOW_BYTES)]
    draw.shuffle(windows)
    found: dict[str, Tokens] = {}
    wanted = sampling.per_label
    for file, start in windows:
        if wanted is not None and len(found) >= wanted:
            break
        fresh = [pair for pair in _window(file, start, eos) if len(pair[1]) >= sampling.min_tokens]
        left = len(fresh) if wanted is None else min(PER_WINDOW, wanted - len(found), len(fresh))
        if wanted is not None and len(windows) * PER_WINDOW < wanted:
            left = min(len(fresh), wanted - len(found))  # few windows: take all that they have
        found |= {fresh[i][0]: fresh[i][1] for i in sorted(draw.sample(range(len(fresh)), left))}
    return sorted(found.items())


def _window(file: TokenFile, start: int, eos: int) -> list[tuple[str, Tokens]]:
    """The documents that begin in a window, read up to a window further for their ends."""
    before = TOKEN_BYTES if start else 0  # the token before tells whether a document begins right at the window
    documents = split_documents(read_tokens(file, start - before, 2 * WINDOW_BYTES), eos)
    if start:  # what comes before the first EOS began in another window
        documents = documents[1:]
    places = [((start - before) // TOKEN_BYTES + first, ids) for first, ids in documents]
    return [(f"{file.url}@{place:012d}", ids) for place, ids in places if place < (start + WINDOW_BYTES) // TOKEN_BYTES]


