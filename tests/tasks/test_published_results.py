"""Result files that the published evaluation wrote: the same responses give the same metrics, labels and ids."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from emo_select.tasks import Generation, LogLikelihood, get_tasks

NOT_COMPARED = {"num_tokens", "max_tokens_reached"}  # of generation: they depend on the batch
RUNS = [(model, task) for model, tasks in {
    "random": ["arc_challenge", "boolq", "coqa", "drop", "gsm8k", "hellaswag", "mmlu_biology", "mmlu_pro_law",
               "winogrande"],
    "trained": ["arc_challenge", "coqa", "drop", "gsm8k"],
}.items() for task in tasks]


def responses(outputs: list[Mapping[str, Any]]) -> list[Any]:
    if "continuation" in outputs[0]:
        return [Generation(outputs[0]["continuation"], outputs[0]["num_tokens"])]
    found = [LogLikelihood(one["sum_logits"], one["is_greedy"]) for one in outputs]
    return found + [LogLikelihood(one["sum_logits_uncond"], False) for one in outputs if "sum_logits_uncond" in one]


def agree(ours: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert set(ours) == set(expected)
    for name in set(expected) - NOT_COMPARED:
        if isinstance(expected[name], dict):
            agree(ours[name], expected[name])
        elif expected[name] is None:
            assert ours[name] is None
        else:
            tolerance = 1e-6 if name.startswith("softloss") else 1e-9
            assert ours[name] == pytest.approx(expected[name], rel=1e-12, abs=tolerance), name


@pytest.mark.parametrize("model, name", RUNS)
def test_same_metrics_from_the_recorded_responses(model: str, name: str, shared_dir: Path) -> None:
    (task,) = get_tasks([name], shared_dir / "data")
    stem = shared_dir / f"golden/tasks/e2e/{model}/results/task-{task.alias.replace(':', '_')}"
    lines = [json.loads(line) for line in Path(f"{stem}-predictions.jsonl").read_text().splitlines()]
    docs = task.docs("test")[: len(lines)]
    found = []
    for doc, line in zip(docs, lines, strict=True):
        ours = task.prediction(doc, responses(line["model_output"]))
        agree(ours["metrics"], line["metrics"])
        assert doc["native_id"] == line["native_id"]
        assert ours["label"] == line["label"]
        assert ours["model_output"][0].get("model_answer") == line["model_output"][0].get("model_answer")
        found.append(ours["metrics"])
    expected = json.loads(Path(f"{stem}-metrics.json").read_text())
    agree(task.aggregate(found, docs), expected["metrics"])
    assert (task.alias, task.primary_metric) == (expected["task_name"], expected["task_config"]["primary_metric"])
