"""From tokens to words, and the words that set a cluster apart.

Tokens are pieces of words, and one character may be split over several tokens. `Pieces` puts both together: it decodes
runs of tokens until they form whole characters, and joins the pieces between white space to words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emo_select.analysis.layout import ModelFolder, RoutingInfo, Word
from emo_select.checkpoint.sources import resolve
from emo_select.errors import ModelError, SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIMMED = re.compile(r"^[^\w]+|[^\w]+$")
LEAST = 3  # times that a word has to occur in a cluster to speak for it
LIST_WORDS = 12


def tokenizer_of(info: RoutingInfo) -> PreTrainedTokenizerBase | None:
    """The tokenizer of an extracted model, from its folder or the Hub's cache; None where it has none any more."""
    from emo_select.models import load_tokenizer

    try:
        resolve(info.model, download=False)
        return load_tokenizer(info.model)
    except (ModelError, SpecError, OSError):
        return None


@dataclass(frozen=True)
class Pieces:
    """Text of token ids. Without a tokenizer an id is written as its number."""

    tokenizer: Any

    def text(self, ids: Sequence[int]) -> str:
        """The text of consecutive tokens."""
        if self.tokenizer is None:
            return "".join(f" {number}" for number in ids)
        return str(self.tokenizer.decode([int(number) for number in ids], skip_special_tokens=False,
                                         clean_up_tokenization_spaces=False))

    def split(self, ids: Sequence[int]) -> list[str]:
        """A piece of text per token; a character split over tokens goes to the last of them, the others are empty."""
        alone = [self._alone(int(number)) for number in ids]
        found, pending = list[str](), list[int]()
        for number, piece in zip(ids, alone, strict=True):
            if "�" not in piece and not pending:
                found.append(piece)
                continue
            pending.append(int(number))
            joined = self.text(pending)
            whole = not joined.endswith("�") or len(pending) >= 8
            found.append(joined if whole else "")
            pending = [] if whole else pending
        if pending:  # cut within a character
            found[-1] = self.text(pending)
        return found

    def _alone(self, number: int) -> str:
        cached = self._cache.get(number)
        if cached is None:
            cached = self.text([number])
            if self.tokenizer is not None and str(self.tokenizer.convert_ids_to_tokens(number)).startswith("▁"):
                cached = f" {cached.removeprefix(' ')}"  # sentencepiece leaves out the space of a token on its own
            self._cache[number] = cached
        return cached

    @cached_property
    def _cache(self) -> dict[int, str]:
        return {}


@dataclass(frozen=True)
class TokenWords:
    """Which word each token belongs to.

    Attributes:
        words: the distinct words, lower case, without punctuation around them; signs stand for themselves.
        of_token: (T,) index into `words` of the word that a token is part of.
        begins: (T,) whether the token is the first of its word, by which words are counted once.
    """

    words: Sequence[str]
    of_token: NDArray[np.int32]
    begins: NDArray[np.bool_]

    @cached_property
    def stop(self) -> NDArray[np.bool_]:
        """(W,) words that say nothing of a topic: stop words, single letters, what has no letter."""
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

        return np.asarray([word in ENGLISH_STOP_WORDS or len(word) < 2 or not any(map(str.isalpha, word))
                           for word in self.words])


def token_words(folder: ModelFolder, tokenizer: PreTrainedTokenizerBase | None) -> TokenWords:
    """The words of all tokens. A word ends at white space or a change between letters and other signs."""
    pieces, known = Pieces(tokenizer), dict[str, int]()
    of_token = np.empty(len(folder.tokens), dtype=np.int32)
    begins = np.zeros(len(folder.tokens), dtype=bool)
    for start, stop in zip(folder.bounds[:-1], folder.bounds[1:], strict=True):
        texts = pieces.split(folder.tokens[start:stop].tolist())
        for first, last in _groups(texts):
            text = "".join(texts[first:last])
            word = TRIMMED.sub("", text).lower() or _signs(text)
            of_token[start + first:start + last] = known.setdefault(word, len(known))
            begins[start + first] = True
    return TokenWords(list(known), of_token, begins)


def _signs(text: str) -> str:
    """What stands for a piece without letters and digits: its signs, line ends made visible."""
    bare = text.strip(" ").replace("\n", "↵").replace("\t", "⇥")
    return bare if bare or not text else "␣"


def _groups(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(first, one past last) of runs of pieces that form one word."""
    starts = [i for i in range(len(texts)) if i == 0 or not _continues(texts[i - 1], texts[i])]
    return list(zip(starts, [*starts[1:], len(texts)], strict=True)) if texts else []


def _continues(before: str, piece: str) -> bool:
    if not piece or not before:
        return True  # part of a character, or what follows one
    return before[-1].isalnum() and (piece[0].isalnum() or piece[0] in "'’_")


def weighted_words(counts: NDArray[np.int64], totals: NDArray[np.int64], words: Sequence[str],
                   stop: NDArray[np.bool_] | None = None, *, most: int = LIST_WORDS) -> tuple[Word, ...]:
    """Class-based TF-IDF: a word's share in the cluster × log(1 + its expected share's inverse).

    Args:
        counts: (W,) occurrences in the cluster. totals: (W,) in all texts.
        stop: words to leave out.
    """
    size = counts.sum()
    if not size:
        return ()
    frequency = counts / size
    rarity = np.log1p(totals.sum() / np.maximum(totals, 1) / max(len(words), 1))
    lift = frequency / np.maximum(totals / max(totals.sum(), 1), 1e-12)
    scores = frequency * rarity * np.log2(np.maximum(lift, 1))  # a word commoner elsewhere says nothing here
    usable = (counts >= min(LEAST, counts.max())) & (scores > 0) & np.asarray([bool(word) for word in words])
    if stop is not None:
        usable &= ~stop
    order = np.argsort(-np.where(usable, scores, -1), kind="stable")[:most]
    return tuple(Word(word=words[i], score=float(scores[i]), count=int(counts[i])) for i in order if usable[i])
