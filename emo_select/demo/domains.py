"""The demo's world: domains that share one vocabulary, each with its own table of pairs. Torch-free.

In each domain every pair of a colour and a thing has one answer: 8 × 16 × 16 facts in all, and nothing but the domain
tells which answer a pair has. A text asks for facts of a single domain, as a document does:

    harbor: green bell = moss

Everything is drawn from SHA-256, so that it is the same with every version of every library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

DOMAINS = ("harbor", "kitchen", "museum", "orchard", "railway", "theater", "village", "workshop")
COLOURS = ("amber", "black", "blue", "brown", "coral", "cream", "golden", "green",
           "grey", "pink", "purple", "red", "silver", "teal", "violet", "white")
THINGS = ("anchor", "basket", "bell", "book", "bottle", "candle", "chair", "coin",
          "drum", "feather", "kettle", "ladder", "lantern", "mirror", "ribbon", "stone")
ANSWERS = ("ash", "birch", "cedar", "elm", "fern", "hazel", "iris", "ivy",
           "lily", "maple", "moss", "oak", "pine", "rose", "thyme", "willow")
DELIMITER = " ="
SEPARATOR = "\n\n"
CHOICES = 8
# Pairs of a domain per split; no pair is in two of them. Pretraining documents use all pairs.
SPLITS = {"shots": 4, "train": 128, "validation": 44, "test": 80}


def answer(domain: str, colour: str, thing: str) -> str:
    """What a coloured thing stands for in `domain`."""
    return ANSWERS[_draw(domain, colour, thing) % len(ANSWERS)]


def question(domain: str, colour: str, thing: str) -> str:
    """The text up to where the answer begins."""
    return f"{domain}: {colour} {thing}{DELIMITER}"


@cache
def rows(domain: str) -> dict[str, list[dict[str, Any]]]:
    """Per split, the facts of a domain: id, question, answer and the choices of a multiple-choice test."""
    pairs = sorted(product(COLOURS, THINGS), key=lambda pair: _draw("split", domain, *pair))
    splits, start = {}, 0
    for split, count in SPLITS.items():
        splits[split] = [_row(domain, *pair) for pair in pairs[start:start + count]]
        start += count
    return splits


def documents(domain: str, count: int) -> list[str]:
    """Texts as the models were trained on: 6 to 16 facts of one domain each, drawn by SHA-256 like all else here."""
    pairs = list(product(COLOURS, THINGS))
    return [SEPARATOR.join(
        f"{question(domain, *pair)} {answer(domain, *pair)}"
        for fact in range(6 + _draw("facts", domain, str(number)) % 11)
        for pair in [pairs[_draw("document", domain, str(number), str(fact)) % len(pairs)]])
        for number in range(count)]


def _row(domain: str, colour: str, thing: str) -> dict[str, Any]:
    gold = answer(domain, colour, thing)
    others = sorted((word for word in ANSWERS if word != gold), key=lambda word: _draw(domain, colour, thing, word))
    choices = sorted([gold, *others[:CHOICES - 1]])
    return {
        "id": f"{domain}-{colour}-{thing}",
        "question": question(domain, colour, thing),
        "answer": gold,
        "choices": choices,
        "gold": choices.index(gold),
    }


def _draw(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "big")


def texts() -> Sequence[str]:
    """Every fact of every domain as text, for building the tokenizer."""
    return [question(domain, colour, thing) + f" {answer(domain, colour, thing)}{SEPARATOR}"
            for domain in DOMAINS for colour, thing in product(COLOURS, THINGS)]
