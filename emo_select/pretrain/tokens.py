"""Token files and mixes: what a training reads, checked before it starts.

A token file holds the numbers of its documents' tokens one after the other, as raw little-endian unsigned integers
without a header, an end-of-text token after each document. A mix is a list of such files with labels. Layout:
arXiv 2605.06663's training data (docs/data.md).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select import textfile
from emo_select.checkpoint.tokenizer import TokenizerFiles, tokenizer_folder
from emo_select.errors import TokenDataError
from emo_select.progress import track

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"  # folder beside the token files
PLACEHOLDER = "{TOKENIZER}"
BYTES = {"uint8": 1, "uint16": 2, "uint32": 4}
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # looked at per file, evenly spaced
SCAN = 1 << 22  # numbers looked at once where a sample is not enough
WIDE = 8  # numbers that tell wider ones from narrow ones
NUMPY_MAGIC = b"\x93NUMPY"
DOLMA2 = "allenai/dolma2-tokenizer"  # of all published trainings, and never on a compute node
KNOWN = {DOLMA2: (100278, 100257, 100277)}  # vocabulary, end of text, padding


@dataclass(frozen=True)
class Vocabulary:
    """What token files say nothing about: which numbers there are, and which of them ends a document."""

    size: int
    eos: int
    pad: int | None
    name: str | None  # of the tokenizer: a Hub id, or its folder


@dataclass(frozen=True)
class TokenData:
    """Token files in the order of their mix, all of one tokenizer.

    `labels` are those of the mix; they have no weight: proportions are counts of tokens.
    """

    files: tuple[Path, ...]
    labels: tuple[str, ...]
    dtype: str
    vocab_size: int
    eos_token_id: int
    pad_token_id: int | None
    tokenizer: str | None
    fingerprint: str  # hex SHA-256 over names, lengths and a part of the content of all files, in order

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each file."""
        return tuple(path.stat().st_size // BYTES[self.dtype] for path in self.files)

    @property
    def tokens(self) -> int:
        """Tokens of all files."""
        return sum(self.sizes)


def dtype_for(vocab_size: int) -> str:
    """The smallest unsigned type that holds every number of the vocabulary."""
    return next(name for name, width in BYTES.items() if vocab_size <= 1 << 8 * width)


def read_mix(path: Path, root: Path | None = None, tokenizer: str | None = None, *, dtype: str | None = None
             ) -> TokenData:
    """Token files of a folder that `emo-select tokenize` wrote, of a mix list, or one token file; all checked.

    Args:
        path: the folder (with manifest.json), the list (lines `label,path`, # comments, `{TOKENIZER}` in paths), or
            the file.
        root: where paths of a list begin; None: the folder of the list.
        tokenizer: folder, Hub id or demo/NAME; None: the one of the manifest beside the files.
        dtype: of the files; None: that of the manifest, else the smallest for the vocabulary.

    Raises:
        TokenDataError: a file is missing, truncated, of another width or vocabulary, or has no end of text.
    """
    entries = _entries(path, root, tokenizer)
    _require_files(path, entries)
    manifests = _manifests([file for _, file in entries])
    vocabulary = _vocabulary(path, tokenizer, manifests)
    stored = dtype or _recorded_dtype(path, manifests) or dtype_for(vocabulary.size)
    for _, file in entries:
        check_file(file, stored, vocabulary, _recorded(manifests.get(file.parent), file))
    labels, files = zip(*entries, strict=True)
    return TokenData(files, labels, stored, vocabulary.size, vocabulary.eos, vocabulary.pad, vocabulary.name,
                     _fingerprint(files, stored, vocabulary))


def _fingerprint(files: Sequence[Path], dtype: str, vocabulary: Vocabulary) -> str:
    digest = hashlib.sha256(f"{dtype} {vocabulary.size} {vocabulary.eos}".encode())
    for path in files:
        digest.update(f"\n{path.name} {path.stat().st_size} ".encode())
        for sample in _samples(path):
            digest.update(sample)
    return digest.hexdigest()


def check_file(path: Path, dtype: str, vocabulary: Vocabulary, recorded: int | None = None) -> None:
    """Refuse a token file that this vocabulary cannot have; looks at a megabyte of it, evenly spaced.

    `recorded` is its size in bytes by its manifest. Raises: TokenDataError.
    """
    size, width = path.stat().st_size, BYTES[dtype]
    if recorded is not None and size != recorded:
        raise TokenDataError(f"{path} has {size} bytes, but its manifest says {recorded}; it is truncated or another "
                             "file.")
    if not size:
        raise TokenDataError(f"{path} is empty; leave it out of the mix.")
    with path.open("rb") as file:
        if file.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
            raise TokenDataError(f"{path} begins with a header of numpy; token files are raw numbers without one. "
                                 "Write it again with array.tofile.")
    if size % width:
        raise TokenDataError(f"{path} has {size} bytes, which is no multiple of {width} ({dtype}); it is truncated, or "
                             "its numbers have another width.")
    _check_numbers(path, dtype, vocabulary)


def read_tokens(path: Path, dtype: str) -> np.ndarray:
    """The numbers of a file, mapped rather than read."""
    import numpy as np

    return np.memmap(path, mode="r", dtype=np.dtype(dtype).newbyteorder("<"))


def shares(data: TokenData) -> dict[str, dict[str, int]]:
    """Label → files and tokens, in the order of the mix."""
    counted: dict[str, dict[str, int]] = {}
    for label, tokens in zip(data.labels, data.sizes, strict=True):
        entry = counted.setdefault(label, {"files": 0, "tokens": 0})
        entry["files"] += 1
        entry["tokens"] += tokens
    return counted


def verify(data: TokenData) -> int:
    """Compare every byte with the checksums in manifests; returns how many files have one.

    Raises:
        TokenDataError: names a file that is not the one its manifest describes.
    """
    manifests, checked = _manifests(data.files), 0
    with track("Reading token files", len(data.files)) as bar:
        for path in data.files:
            entry = _entry(manifests.get(path.parent), path)
            if entry is not None:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != entry["sha256"]:
                    raise TokenDataError(f"{path} is not the file that its manifest describes; copy it again, or "
                                         "tokenize its texts again.")
                checked += 1
            bar.advance()
    return checked


def vocabulary_of(name: str, *, download: bool = True) -> Vocabulary:
    """What the tokenizer `name` (folder, Hub id, demo/NAME) says of token files.

    Raises:
        ModelError: there is no such tokenizer. TokenDataError: it has no token that ends a text.
    """
    if name in KNOWN:
        return Vocabulary(*KNOWN[name], name)
    files = TokenizerFiles(tokenizer_folder(name, download=download))
    if files.end is None:
        raise TokenDataError(f"The tokenizer {name} has no token that ends a text; set eos_token in its "
                             "tokenizer_config.json.")
    local = Path(name).expanduser()
    return Vocabulary(files.size, files.end, files.pad, str(local.resolve()) if local.is_dir() else name)


def _check_numbers(path: Path, dtype: str, vocabulary: Vocabulary) -> None:
    import numpy as np

    ends, width = 0, BYTES[dtype]
    for sample in _samples(path):
        numbers = np.frombuffer(sample, np.dtype(dtype).newbyteorder("<"))
        if (largest := int(numbers.max())) >= vocabulary.size:
            raise TokenDataError(f"{path} holds the number {largest}, but the tokenizer has {vocabulary.size} tokens; "
                                 f"the file is of another tokenizer, or its numbers are not {dtype}.")
        if width < 4 and len(numbers) >= WIDE and not numbers[1::2].any():
            raise TokenDataError(f"{path} has 0 in every second place; its numbers are wider than {dtype}.")
        ends += int((numbers == vocabulary.eos).sum())
    if not ends and not _has(path, dtype, vocabulary.eos):
        raise TokenDataError(f"{path} has no end of text (token {vocabulary.eos}): documents run into each other, or "
                             "it is of another tokenizer; tokenize its texts again.")


def _has(path: Path, dtype: str, number: int) -> bool:
    """Whether the number is anywhere in the file, which is read until it is found."""
    tokens = read_tokens(path, dtype)
    return any((tokens[start:start + SCAN] == number).any() for start in range(0, len(tokens), SCAN))


def _samples(path: Path) -> Iterator[bytes]:
    """The whole of a small file, else pieces of it that begin at multiples of every width."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            yield file.read()
            return
        last = size - SAMPLE_BYTES
        for number in range(SAMPLES):
            start = last * number // (SAMPLES - 1) // 4 * 4
            yield os.pread(file.fileno(), SAMPLE_BYTES, start)


def _entries(path: Path, root: Path | None, tokenizer: str | None) -> list[tuple[str, Path]]:
    if path.is_dir():
        content = _manifest(path)
        if content is None:
            raise TokenDataError(f"{path} has no {MANIFEST}; give a folder that `emo-select tokenize` wrote, a mix "
                                 "list or a token file.")
        return [(entry["label"], path / entry["file"]) for entry in content["files"]]
    textfile.require_file(path, TokenDataError)
    if path.suffix not in (".txt", ".csv", ".mix"):
        return [(path.stem, path)]
    return list(_listed(path, root or path.parent, tokenizer))


def _listed(path: Path, root: Path, tokenizer: str | None) -> Iterator[tuple[str, Path]]:
    found = False
    for where, line in textfile.read_lines(path, TokenDataError):
        content = line.partition("#")[0].strip() if line.lstrip().startswith("#") else line.strip()
        if not content:
            continue
        label, comma, name = content.partition(",")
        if not (comma and label.strip() and name.strip()):
            raise TokenDataError(f"{where}: {content!r} is not `label,path`; a mix names a label and a token file.")
        if PLACEHOLDER in name and tokenizer is None:
            raise TokenDataError(f"{where} has {PLACEHOLDER} in its path; say which with --tokenizer.")
        found = True
        yield label.strip(), root / name.strip().replace(PLACEHOLDER, tokenizer or "")
    if not found:
        raise TokenDataError(f"{path} names no token file; a mix has lines `label,path`.")


def _require_files(path: Path, entries: Sequence[tuple[str, Path]]) -> None:
    missing = [file for _, file in entries if not file.is_file()]
    if missing:
        raise TokenDataError(f"{len(missing)} of the {len(entries)} token files that {path} names do not exist, the "
                             f"first is {missing[0]}; check the root and the tokenizer in their paths.")
    file, times = Counter(file for _, file in entries).most_common(1)[0]
    if times > 1:
        raise TokenDataError(f"{path} names {file} {times} times; a mix has each file once.")


def _manifests(files: Sequence[Path]) -> dict[Path, Any]:
    """Folder → its manifest, where it has one."""
    folders = dict.fromkeys(file.parent for file in files)
    return {folder: content for folder in folders if (content := _manifest(folder)) is not None}


def _manifest(folder: Path) -> Any:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    content = textfile.read_json_object(path, TokenDataError)
    missing = {"files", "dtype", "vocab_size", "eos_token_id"} - content.keys()
    if missing or content["dtype"] not in BYTES:
        raise TokenDataError(f"{path} is not a manifest of token files; tokenize the texts again.")
    return content


def _recorded(manifest: Any, file: Path) -> int | None:
    entry = _entry(manifest, file)
    return entry["bytes"] if entry else None


def _entry(manifest: Any, file: Path) -> Any:
    entries = manifest["files"] if manifest else ()
    return next((entry for entry in entries if entry["file"] == file.name), None)


def _vocabulary(path: Path, tokenizer: str | None, manifests: dict[Path, Any]) -> Vocabulary:
    if len({(m["vocab_size"], m["eos_token_id"]) for m in manifests.values()}) > 1:
        raise TokenDataError(f"{path} mixes token files of different tokenizers; one training reads files of one.")
    if not manifests:
        if tokenizer is None:
            raise TokenDataError(f"Nothing says of which tokenizer the token files of {path} are; name it with "
                                 "--tokenizer.")
        return vocabulary_of(tokenizer)
    folder, manifest = next(iter(manifests.items()))
    own = str(folder / TOKENIZER) if (folder / TOKENIZER).is_dir() else manifest.get("tokenizer")
    vocabulary = Vocabulary(manifest["vocab_size"], manifest["eos_token_id"], manifest.get("pad_token_id"), own)
    if tokenizer is not None and PLACEHOLDER not in str(path) and tokenizer not in (own, manifest.get("tokenizer")):
        _require_same(path, vocabulary, vocabulary_of(tokenizer))
    return vocabulary


def _require_same(path: Path, recorded: Vocabulary, named: Vocabulary) -> None:
    if (recorded.size, recorded.eos) != (named.size, named.eos):
        raise TokenDataError(f"The token files of {path} are of another tokenizer ({recorded.size} tokens, end of text "
                             f"{recorded.eos}) than {named.name} ({named.size}, {named.eos}).")


def _recorded_dtype(path: Path, manifests: dict[Path, Any]) -> str | None:
    found = sorted({manifest["dtype"] for manifest in manifests.values()})
    if len(found) > 1:
        raise TokenDataError(f"{path} mixes token files of different widths ({', '.join(found)}); one training reads "
                             "files of one.")
    return found[0] if found else None
