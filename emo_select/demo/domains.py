"""The demo's world: domains that share one vocabulary, each with its own table of pairs. Torch-free.

In each domain every ordered pair of words has one answer, `DOMAINS × 16 × 16` facts in all, with nothing to tell the
answer of one domain from that of another. A text asks for facts of a single domain, as a document does:

    harbor: bell clay = moss

Everything is drawn from SHA-256, so that it is the same with every version of every library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

DOMAINS = ("harbor", "kitchen", "museum", "orchard", "railway", "theater", "village", "workshop")
WORDS = ("ash", "bell", "clay", "dusk", "elm", "fern", "gold", "hail",
         "iris", "jade", "kelp", "lime", "moss", "nest", "opal", "pine")
DELIMITER = " ="
SEPARATOR = "\n\n"
CHOICES = 8
# Pairs of a domain per split; no pair is in two of them. Pretraining documents use all pairs.
SPLITS = {"shots": 4, "train": 128, "validation": 44, "test": 80}


def answer(domain: str, left: str, right: str) -> str:
    """What `left right` gives in `domain`."""
    return WORDS[_draw(domain, left, right) % len(WORDS)]


def question(domain: str, left: str, right: str) -> str:
    """The text up to where the answer begins."""
    return f"{domain}: {left} {right}{DELIMITER}"


@cache
def rows(domain: str) -> dict[str, list[dict[str, Any]]]:
    """Per split, the facts of a domain: id, question, answer and the choices of a multiple-choice test."""
    pairs = sorted(((left, right) for left in WORDS for right in WORDS), key=lambda pair: _draw("split", domain, *pair))
    splits, start = {}, 0
    for split, count in SPLITS.items():
        splits[split] = [_row(domain, *pair) for pair in pairs[start:start + count]]
        start += count
    return splits


def _row(domain: str, left: str, right: str) -> dict[str, Any]:
    gold = answer(domain, left, right)
    others = sorted((word for word in WORDS if word != gold), key=lambda word: _draw(domain, left, right, word))
    choices = sorted([gold, *others[:CHOICES - 1]])
    return {
        "id": f"{domain}-{left}-{right}",
        "question": question(domain, left, right),
        "answer": gold,
        "choices": choices,
        "gold": choices.index(gold),
    }


def _draw(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "big")


def texts() -> Sequence[str]:
    """Every fact of every domain as text, for building the tokenizer."""
    return [question(domain, left, right) + f" {answer(domain, left, right)}{SEPARATOR}"
            for domain in DOMAINS for left in WORDS for right in WORDS]
