"""The tasks `demo_<domain>`, group `demo`: one per domain, half multiple choice and half generation. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emo_select.demo import domains
from emo_select.tasks.base import Row, Task, id_field
from emo_select.tasks.kinds import Generate, MultipleChoice, choice_doc, generation_doc, score_exact
from emo_select.tasks.shots import first_rows
from emo_select.tasks.sources import MemoryRows
from emo_select.tasks.splits import AS_STORED

GROUP = "demo"
SHOTS = domains.SPLITS["shots"]
MAX_TOKENS = 4  # an answer is one token, then the text ends


def tasks(data_dir: Path | None = None) -> list[Task]:
    """All demo tasks; even-numbered domains are asked by choice, odd-numbered ones by generation."""
    kinds = (_multiple_choice, _generation)
    return [kinds[index % 2](domain) for index, domain in enumerate(domains.DOMAINS)]


def _multiple_choice(domain: str) -> Task:
    return MultipleChoice(**_common(domain), read=_choices, primary_metric="acc_raw", unconditional=False)


def _generation(domain: str) -> Task:
    return Generate(**_common(domain), read=_reference, primary_metric="exact_match", score=score_exact,
                    stops=(domains.SEPARATOR,), max_tokens=MAX_TOKENS)


def _common(domain: str) -> dict[str, Any]:
    rows = domains.rows(domain)
    return {
        "name": f"demo_{domain}",
        "alias": f"demo_{domain}",
        "group": GROUP,
        "sources": (MemoryRows(f"demo/{domain}", rows),),
        "rule": AS_STORED,
        "default_shots": SHOTS,
        "native_id": id_field("id"),
        "shots": first_rows("shots", SHOTS),
        "delimiter": domains.DELIMITER,
        "sizes": (len(rows["train"]), len(rows["test"])),
    }


def _choices(row: Row) -> Mapping[str, Any]:
    return choice_doc(row["question"], row["choices"], row["gold"])


def _reference(row: Row) -> Mapping[str, Any]:
    return generation_doc(row["question"], row["answer"], [row["answer"]])
