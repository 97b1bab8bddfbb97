"""How many texts a task has and how long they are, for plans: from its data or, of published tasks, as measured once.

`lengths.json` holds, per published task and split, the mean characters of what comes before a document (header and
few-shot examples) and of the document with its answer, taken from the public data sets.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path

from emo_select.tasks.base import Task

CHARACTERS_PER_TOKEN = 4.0  # of English text under the usual vocabularies; a plan must not need the tokenizer
SAMPLE = 64


def known(task: Task) -> bool:
    """Whether sizes and lengths are known on this machine."""
    return task.available or task.name in _measured()


def count(task: Task, split: str) -> int:
    """Documents of a split, as published where that is known: reading them all takes minutes."""
    if task.sizes is not None:
        return task.sizes[1 if split == "test" else 0]
    return len(task.docs(split))


@lru_cache(maxsize=1024)
def mean_tokens(task: Task, split: str, num_shots: int | None) -> float:
    """Mean tokens of the texts of a split, with their few-shot examples."""
    if task.available:
        docs = task.docs(split)
        some = docs[::max(1, len(docs) // SAMPLE)]  # from all subjects: each has its own few-shot examples
        lengths = [len(task.prefix(doc, num_shots)) + len(task.prompt(doc)) + len(task.answer(doc)) for doc in some]
        return sum(lengths) / len(lengths) / CHARACTERS_PER_TOKEN
    before, own = _measured()[task.name]["test" if split == "test" else "train"]
    share = 1.0 if num_shots is None or not task.default_shots else num_shots / task.default_shots
    return (before * share + own) / CHARACTERS_PER_TOKEN


@cache
def _measured() -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = json.loads(
        Path(__file__).with_name("lengths.json").read_text(encoding="utf-8"))
    return found
