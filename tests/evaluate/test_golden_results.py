"""The whole path, from a checkpoint to result files, against the files that the reference wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from emo_select.evaluate import EvalOptions, evaluate_checkpoint
from emo_select.tasks import get_tasks

ABSOLUTE, RELATIVE = 5e-4, 2e-6
COUNTED_OTHERWISE = ("per_token", "num_tokens", "max_tokens_reached", "extra_metrics")
SUMS = ("sum_logits", "sum_logits_uncond", "logits_per_char", "bits_per_byte")
RUNS = [(model, task) for model, tasks in {
    "random": ("arc_challenge", "boolq", "coqa", "drop", "gsm8k_generation_8shot", "hellaswag", "mmlu_biology",
               "mmlu_pro_law", "winogrande"),
    "trained": ("arc_challenge", "coqa", "drop", "gsm8k_generation_8shot"),
}.items() for task in tasks]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def comparable(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without what counts tokens: the reference always divides by 1 and its generations depend on the batch."""
    return {name: value for name, value in metrics.items() if not any(part in name for part in COUNTED_OTHERWISE)}


@pytest.mark.parametrize(("model", "name"), RUNS)
def test_result_files_equal_the_reference(shared_dir: Path, tmp_path: Path, model: str, name: str) -> None:
    folder = shared_dir / "golden" / "tasks" / "e2e"
    index = json.loads((folder / "index.json").read_text())
    [task] = get_tasks([name.replace("_generation_8shot", "")], data_dir=shared_dir / "data")
    [run] = [run for run in index["runs"][model] if run["task"] == task.name]
    options = EvalOptions(num_shots=run["num_shots"], limit=index["first_docs"], device="cpu")
    metrics = evaluate_checkpoint(folder / model / "model", [task], tmp_path, options)[task.name]

    expected = json.loads((folder / model / "results" / run["metrics"]).read_text())
    written = json.loads((tmp_path / run["metrics"]).read_text())
    assert written["metrics"] == metrics
    assert written.keys() >= expected.keys() - {"beaker_info"}
    assert written["num_instances"] == expected["num_instances"]
    assert metrics.keys() == expected["metrics"].keys()
    for key, value in comparable(expected["metrics"]).items():
        loose = key.startswith("softloss") or key.endswith("_corr")
        assert metrics[key] == pytest.approx(value, abs=1e-5 if loose else 1e-9, rel=RELATIVE if loose else 1e-9), key

    found = lines(tmp_path / run["predictions"])
    for ours, theirs in zip(found, lines(folder / model / "results" / run["predictions"]), strict=True):
        assert_same_prediction(ours, theirs)


def assert_same_prediction(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys() | {"question_hash"}
    assert (ours["doc_id"], ours["native_id"]) == (theirs["doc_id"], theirs["native_id"])
    assert sorted(map(str, as_list(ours["label"]))) == sorted(map(str, as_list(theirs["label"])))
    for key, value in comparable(theirs["metrics"]).items():
        assert same(ours["metrics"][key], value), key
    for one, other in zip(ours["model_output"], theirs["model_output"], strict=True):
        assert one.get("continuation") == other.get("continuation")
        assert one.get("model_answer") == other.get("model_answer")
        for key in SUMS if "num_chars" in other else ():
            assert same(one.get(key), other.get(key)), key


def same(one: Any, other: Any) -> bool:
    return one is other if other is None else one == pytest.approx(other, abs=ABSOLUTE, rel=RELATIVE)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_a_subject_from_its_category_equals_the_subject_alone(shared_dir: Path, tmp_path: Path) -> None:
    model = shared_dir / "golden" / "tasks" / "e2e" / "random" / "model"
    category, subject = get_tasks(["mmlu_business", "mmlu_marketing"], data_dir=shared_dir / "data")
    samples = {category.name: [0, 1, 40, 41, 80, 81, 82]}  # the last three are marketing's first three
    docs = category.docs("test")
    first = next(number for number, doc in enumerate(docs) if doc["group"] == "marketing")
    samples = {category.name: [0, 1, first, first + 1, first + 2]}
    evaluate_checkpoint(model, [category], tmp_path, EvalOptions(samples=samples, device="cpu"))
    evaluate_checkpoint(model, [subject], tmp_path / "alone", EvalOptions(limit=3, device="cpu"))
    name = "task-mmlu_merged_marketing_rc_test"
    derived, alone = tmp_path / "per_subject" / "marketing", tmp_path / "alone"
    one, other = (json.loads((path / f"{name}-metrics.json").read_text()) for path in (derived, alone))
    assert one["num_instances"] == other["num_instances"] == 3
    assert set(one["metrics"]) == set(other["metrics"])
    for key, value in comparable(other["metrics"]).items():
        assert one["metrics"][key] == pytest.approx(value, abs=1e-5)
    rows = [lines(path / f"{name}-predictions.jsonl") for path in (derived, alone)]
    assert [row["native_id"] for row in rows[0]] == [row["native_id"] for row in rows[1]] == [0, 1, 2]
    assert [row["label"] for row in rows[0]] == [row["label"] for row in rows[1]]


def test_standard_errors_stand_beside_the_metrics(shared_dir: Path, tmp_path: Path) -> None:
    model = shared_dir / "golden" / "tasks" / "e2e" / "random" / "model"
    [task] = get_tasks(["winogrande"], data_dir=shared_dir / "data")
    evaluate_checkpoint(model, [task], tmp_path, EvalOptions(limit=10, device="cpu"))
    content = json.loads((tmp_path / "task-winogrande_merged_rc_test-metrics.json").read_text())
    share = content["metrics"]["acc_raw"]
    assert content["standard_errors"]["acc_raw"] == pytest.approx(math.sqrt(share * (1 - share) / 9))
