"""Split rules where the published sizes matter: long train splits, and MMLU subjects alone."""

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from emo_select.tasks import get_tasks
from emo_select.tasks.mmlu import CATEGORIES, SIZES
from emo_select.tasks.shots import text_key
from emo_select.tasks.sources import MemoryRows


def digest(parts: Iterable[Any]) -> str:
    return hashlib.sha256("".join(f"{part}\x1e" for part in parts).encode()).hexdigest()


@pytest.fixture(scope="module")
def grown(shared_dir: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((shared_dir / "golden/tasks/splits_grown.json").read_text())
    return found


@pytest.mark.parametrize("name", ["squad", "naturalqs", "triviaqa", "drop", "coqa"])
def test_more_than_a_thousand_train_rows(name: str, shared_dir: Path, grown: Mapping[str, Any]) -> None:
    task = get_tasks([name], shared_dir / "data")[0]
    expected = grown["tasks"][task.name]
    rows = {split: list(task.sources[0].rows(split)) for split in ("train", "validation")}
    added = rows["validation"]
    if name == "coqa":
        added = [{**row, "id": f"{row['id']}~{copy}"} for copy in range(3) for row in added]
    source = MemoryRows("grown", {"train": rows["train"] + added})
    bigger = dataclasses.replace(task, sources=(source,))
    docs = bigger.docs("train")
    assert len(docs) == expected["train_docs"]
    ordered = [part for row in task.rule.train((source,)) for part in task.expand(row)]
    key = {"squad": "id", "drop": "query_id", "coqa": "id"}.get(name)
    found = [row[key] if key else text_key(row["question"]) for row in ordered]
    assert found[expected["from"]:][: len(expected["keys"])] == expected["keys"]
    assert digest(found) == expected["train_keys_digest"]
    texts = (example.text for example in bigger.examples("validation", num_shots=0))
    assert digest(texts) == expected["calibration_texts_0shot_digest"]


def test_subjects_alone(shared_dir: Path) -> None:
    """The 29 subjects: splits and requests, and that the category's test documents of a subject are the same."""
    path = shared_dir / "golden/tasks/mmlu_subjects.json.gz"
    subjects = json.loads(gzip.decompress(path.read_bytes()))["subjects"]
    for subject, expected in subjects.items():
        category = get_tasks([f"mmlu_merged_{expected['category']}"], shared_dir / "data")[0]
        task = {part.name: part for part in category.subtasks()}[f"mmlu_merged_{subject}"]
        assert task.alias == expected["reference_task_name"]
        test, train = task.docs("test"), task.docs("train")
        assert (len(test), len(train)) == (expected["test_size"], expected["train_size"])
        for split in ("test", "train"):
            rows = getattr(task.rule, split)(task.sources)
            assert digest(text_key(row["question"]) for row in rows) == expected["digests"][f"{split}_keys"]
        asked = [task.requests(doc) for doc in test]
        flat = [(r.context, r.continuation) for requests, doc in zip(asked, test, strict=True)
                for r in requests[: len(doc["continuations"])]]
        assert digest("\x1f".join(map(str, pair)) for pair in flat) == expected["digests"]["requests"]
        assert digest(doc["gold"] for doc in test) == expected["digests"]["golds"]
        own = [doc for doc in category.docs("test") if doc["group"] == subject]
        assert [category.requests(doc) for doc in own] == asked


def test_categories_cover_57_subjects() -> None:
    subjects = [subject for names in CATEGORIES.values() for subject in names]
    assert len(subjects) == len(set(subjects)) == 57
    assert set(SIZES) == set(CATEGORIES)
