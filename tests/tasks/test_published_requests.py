"""Prompts, requests, splits and texts of the 46 tasks, character by character."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from emo_select.tasks import GROUPS, Task, get_tasks
from emo_select.tasks.kinds import Generate
from emo_select.tasks.shots import text_key

NAMES = [name for names in GROUPS.values() for name in names]


def digest(parts: Iterable[Any]) -> str:
    return hashlib.sha256("".join(f"{part}\x1e" for part in parts).encode()).hexdigest()


Case = tuple[Task, Mapping[str, Any]]


@pytest.fixture(scope="module", params=NAMES)
def case(shared_dir: Path, request: pytest.FixtureRequest) -> Case:
    """Each task with its reference file, once for all tests of this module."""
    path = shared_dir / "golden/tasks/prompts" / f"{request.param}.json.gz"
    return get_tasks([request.param], shared_dir / "data")[0], json.loads(gzip.decompress(path.read_bytes()))


def keys(task: Task, golden: Mapping[str, Any], split: str) -> list[Any]:
    """The key of every row of a split, made as the field `key` of the reference file says."""
    rule = getattr(task.rule, "train" if split == "validation" else split)
    rows = [row for stored in rule(task.sources) for row in task.expand(stored)]
    how = golden["key"]
    if how.startswith("the field "):
        return [row[how.split()[-1]] for row in rows]
    if how.endswith("context + ' ' + question"):
        return [text_key(f"{row['context']} {row['question']}") for row in rows]
    if how.startswith("sha256[:12] of "):
        return [text_key(row[how.split()[2]]) for row in rows]
    return [row["id"] for row in rows]


def same_block(task: Task, golden: Mapping[str, Any]) -> bool:
    """Whether our few-shot block is the published one; not where the data lacks the curated rows."""
    return golden["fewshot"] != "curated"


def test_split_orders_and_sizes(case: Case) -> None:
    task, golden = case
    for split in ("train", "validation", "test"):
        assert digest(keys(task, golden, split)) == golden["digests"][f"{split}_keys"], split
        docs, expected = task.docs(split), golden["splits"][split]
        assert len(docs) == expected["size"]
        ids = [doc["native_id"] for doc in docs[expected["from"]:][: len(expected["native_ids"])]]
        assert ids == expected["native_ids"]
        if golden["complete"]:
            assert (len(task.docs("train")), len(task.docs("test"))) == task.sizes


def test_calibration_and_finetuning_texts(case: Case) -> None:
    task, golden = case
    expected = golden["digests"]
    zero_shot = [example.text for example in task.examples("validation", num_shots=0)]
    assert digest(zero_shot) == expected["calibration_texts_0shot"]
    if same_block(task, golden):
        block = ""
        assert digest(example.text for example in task.examples("validation")) == expected["calibration_texts"]
        assert digest(example.text for example in task.examples("train")) == expected["finetuning_texts"]
    else:
        block = golden["prompt"]["fewshot_block"]
        header = golden["prompt"]["description"]
        texts = [header + block + text[len(header):] for text in zero_shot]
        assert digest(texts) == expected["calibration_texts"] == expected["finetuning_texts"]
    assert all(example.answer.startswith(" ") for example in task.examples("train", limit=50))


def test_requests_of_every_test_document(case: Case) -> None:
    task, golden = case
    shots = None if same_block(task, golden) else 0
    inserted = "" if shots is None else golden["prompt"]["fewshot_block"]
    header = (golden["prompt"] or {}).get("description", "")
    asked = [task.requests(doc, shots) for doc in task.docs("test")]

    def context(text: str) -> str:
        return text if shots is None else header + inserted + text[len(header):]

    expected = golden["digests"]["test"]
    if isinstance(task, Generate):
        assert digest(context(requests[0].context) for requests in asked) == expected["contexts"]
        assert digest(task.prompt(doc) for doc in task.docs("test")) == expected["doc_texts"]
        return
    counts = [len(doc["continuations"]) for doc in task.docs("test")]
    conditional = [request for requests, count in zip(asked, counts, strict=True) for request in requests[:count]]
    prior = [request for requests, count in zip(asked, counts, strict=True) for request in requests[count:]]
    assert digest(f"{context(one.context)}\x1f{one.continuation}" for one in conditional) == expected["requests"]
    parts = [part for doc in task.docs("test") for part in zip(doc["contexts"], doc["continuations"], strict=True)]
    assert digest(f"{text}\x1f{continuation}" for text, continuation in parts) == expected["doc_parts"]
    assert digest(doc["gold"] for doc in task.docs("test")) == expected["golds"]
    if expected["unconditional"] is None:
        assert not prior
    else:
        assert digest(f"{one.context}\x1f{one.continuation}" for one in prior) == expected["unconditional"]


def test_single_documents(case: Case) -> None:
    task, golden = case
    same = same_block(task, golden)
    for entry in [*(golden["requests"] if same else []), *golden["requests_0shot"]]:
        shots = 0 if entry in golden["requests_0shot"] else None
        doc = task.docs("test")[entry["doc_id"]]
        asked = task.requests(doc, shots)
        if isinstance(task, Generate):
            assert asked[0].context == entry["context"]
            assert list(task.stops) == entry["stop_sequences"]
            options = {key: value for key, value in task.generation_options.items() if key != "until"}
            assert options == entry["generation_kwargs"]
            unordered = task.name == "triviaqa_merged"
            assert (sorted(task.label(doc)) if unordered else task.label(doc)) == entry["references"]
        else:
            expected = [*entry["requests"], *entry["unconditional"]]
            assert [(one.context, one.continuation) for one in asked] == [
                (one["context"], one["continuation"]) for one in expected
            ]
            assert doc["gold"] == entry["gold"]
            assert doc["contexts"] == entry["doc_texts"]


def test_names_shots_and_metric(case: Case) -> None:
    task, golden = case
    assert task.alias == golden["reference_task_names"]["test"]
    assert task.default_shots == golden["num_shots"]
    assert task.primary_metric == golden["primary_metric"]
    assert task.name == golden["task"]
    assert [f"task-{task.alias.replace(':', '_')}-{kind}" for kind in ("metrics.json", "predictions.jsonl")] == (
        golden["result_files"]
    )
    if golden["prompt"] and same_block(task, golden):
        block = golden["prompt"]["fewshot_block"]
        assert task.prefix(task.docs("test")[0]) == golden["prompt"]["description"] + block
