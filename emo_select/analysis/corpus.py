"""Documents as token ids with labels, and how many of each label are taken.

Every source of texts ends in a `Corpus`. What is drawn depends on the seed and the order of the source alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from emo_select import progress
from emo_select.analysis.layout import Document
from emo_select.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 42
LABEL_KEYS = ("topic", "format", "source")  # a label that documents have goes by the first of these
CHUNK = 1000
Row = TypeVar("Row")


@dataclass(frozen=True)
class Sampling:
    """How many documents are taken.

    Attributes:
        per_label: at most so many documents of each label; None takes all.
        doc_tokens: tokens per document; longer ones lose their tail. 0 takes documents whole.
        min_tokens: shorter documents are left out.
        seed: of the draw.
        scan: a streamed source is read up to this many documents.
    """

    per_label: int | None = 500
    doc_tokens: int = 100
    min_tokens: int = 1
    seed: int = SEED
    scan: int = 100_000

    def cut(self, ids: Any) -> NDArray[np.int32]:
        """The tokens that count."""
        return np.asarray(ids[:self.doc_tokens or None], dtype=np.int32)


@dataclass(frozen=True)
class Corpus:
    """Documents in order.

    Attributes:
        token_ids: (length,) int32 of each document.
        labels: of each document, by key; "source" is always there.
        names: what the source calls each document.
        about: how they were chosen, as plain data.
        label_key: which label the analysis goes by.
    """

    token_ids: Sequence[NDArray[np.int32]]
    labels: Sequence[Mapping[str, str]]
    names: Sequence[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    label_key: str = "source"

    @cached_property
    def documents(self) -> list[Document]:
        """As they are stored."""
        names = self.names or [""] * len(self.token_ids)
        return [Document(index=i, length=len(ids), labels=dict(labels), name=name)
                for i, (ids, labels, name) in enumerate(zip(self.token_ids, self.labels, names, strict=True))]

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """(N+1,) first row of each document, and T."""
        return np.cumsum([0, *map(len, self.token_ids)], dtype=np.int64)

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """(T,) all of them."""
        return np.concatenate(self.token_ids)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over tokens, bounds and labels."""
        digest = hashlib.sha256(self.tokens.tobytes() + self.bounds.tobytes())
        digest.update(json.dumps([self.label_key, [dict(one) for one in self.labels]], sort_keys=True).encode())
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """Documents per label, most first."""
        return dict(Counter(labels.get(self.label_key, "") for labels in self.labels).most_common())

    def require(self) -> Corpus:
        """Itself. SpecError where it holds no token."""
        if not sum(map(len, self.token_ids)):
            raise SpecError("The texts hold no tokens; give others with --texts, or a smaller --min-tokens.")
        return self


def label_key(labels: Iterable[Mapping[str, str]], wanted: str | None) -> str:
    """The key that documents are told apart by. SpecError for one that no document has."""
    present = {key for one in labels for key, value in one.items() if value}
    if wanted is None:
        return next((key for key in LABEL_KEYS if key in present), "source")
    if wanted not in present:
        raise SpecError(f"No document has the label {wanted!r}; they have {', '.join(sorted(present))}.")
    return wanted


class Reservoir:
    """A uniform draw of at most `size` rows per label from a stream of unknown length, in the stream's order."""

    def __init__(self, size: int | None, seed: int) -> None:
        self.size, self.seed = size, seed
        self.seen: Counter[str] = Counter()
        self._kept: dict[str, list[tuple[int, Any]]] = {}
        self._draws: dict[str, random.Random] = {}

    def add(self, label: str, row: Any) -> None:
        """Consider a row."""
        number, kept = self.seen.total(), self._kept.setdefault(label, [])
        self.seen[label] += 1
        if self.size is None or len(kept) < self.size:
            kept.append((number, row))
            return
        draw = self._draws.setdefault(label, random.Random(f"{self.seed}/{label}"))
        place = draw.randrange(self.seen[label])
        if place < self.size:
            kept[place] = (number, row)

    def rows(self) -> list[Any]:
        """What was drawn."""
        found = [entry for kept in self._kept.values() for entry in kept]
        return [row for _, row in sorted(found, key=lambda entry: entry[0])]


def tokenised(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, sampling: Sampling
              ) -> list[NDArray[np.int32]]:
    """Ids of each text without special tokens, cut to `sampling.doc_tokens`."""
    found: list[NDArray[np.int32]] = []
    with progress.track("Tokenising", total=len(texts)) as bar:
        for start in range(0, len(texts), CHUNK):
            part = list(texts[start:start + CHUNK])
            found += map(sampling.cut, tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])
            bar.advance(len(part))
    return found


def say_taken(corpus: Corpus, most: int | None, doc_tokens: int) -> None:
    """What was taken, at most `most` documents of each label, and what is short or alone."""
    counts = corpus.counts()
    cap = "" if most is None else f", at most {most} of each"
    what = f"{len(counts)} {corpus.label_key}{'s' if len(counts) != 1 else ''}{cap}"
    progress.say(f"{len(corpus.documents):,} documents of {what}; {len(corpus.tokens):,} tokens.")
    short = sum(len(ids) < doc_tokens for ids in corpus.token_ids)
    if short:
        progress.say(f"{short:,} of them have fewer than {doc_tokens} tokens and were taken whole.")
    alone = [label for label, count in counts.items() if count == 1]
    if alone:
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        progress.say(f"Labels with a single document say nothing of their topic: {', '.join(alone[:3])}{more}.")
