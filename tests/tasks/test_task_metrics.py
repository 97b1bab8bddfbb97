"""Metrics per document and their averages against the reference's."""

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from emo_select.tasks import Generation, LogLikelihood, get_tasks
from emo_select.tasks import metrics as m
from emo_select.tasks.kinds import MultipleChoice, score_gsm8k, score_number

CASES = ["mc_uncond", "mc_uncond_mmlu_pro", "mc_plain_boolq", "mc_winogrande", "squad", "triviaqa", "coqa", "naturalqs",
         "drop", "gsm8k"]


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest, shared_dir: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((shared_dir / f"golden/tasks/metrics/{request.param}.json").read_text())
    return found


def document(task: Any, case: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(task, MultipleChoice):
        return {"contexts": ["x"] * len(case["continuations"]), **case, "group": ""}
    if "row_answer" in case:
        return {"group": "", **task.read({"question": "q", "answer": case["row_answer"]})}
    return {"group": "", "source": case.get("source"), "references": case["references"]}


def responses(case: Mapping[str, Any]) -> list[Any]:
    if "generated" in case:
        return [Generation(case["generated"], case.get("num_tokens", 0))]
    sums = [*case["loglikelihoods"], *(case["unconditional"] or [])]
    return [LogLikelihood(value, False, 1, 1) for value in sums]


def agree(ours: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert set(ours) == set(expected)
    for name, value in expected.items():
        if isinstance(value, dict):
            agree(ours[name], value)
        elif value is None or isinstance(value, str):
            assert ours[name] == value, name
        else:
            tolerance = 1e-6 if name.startswith("softloss") else 1e-9
            assert ours[name] == pytest.approx(value, abs=tolerance, rel=0), name


def test_every_case_and_the_average_of_all(golden: Mapping[str, Any]) -> None:
    task = get_tasks([golden["task"]])[0]
    docs = [document(task, case) for case in golden["cases"]]
    found = [task.prediction(doc, responses(case)) for doc, case in zip(docs, golden["cases"], strict=True)]
    for case, ours in zip(golden["cases"], found, strict=True):
        agree(ours["metrics"], case["expected"])
        assert ours["label"] == case["expected_label"]
        if "expected_model_answer" in case:
            assert ours["model_output"][0]["model_answer"] == case["expected_model_answer"]
        for output, expected in zip(ours["model_output"], case.get("expected_model_output", ()), strict=False):
            agree(output, expected)
    agree(task.aggregate([one["metrics"] for one in found], docs), golden["expected_aggregate"])


def test_standard_errors_are_those_of_the_mean() -> None:
    task = get_tasks(["arc_easy"])[0]
    doc = {"continuations": [" a", " b"], "gold": 0, "contexts": ["x", "x"], "group": ""}
    sums = [(-1.0, -2.0), (-2.0, -1.0), (-1.0, -3.0), (-1.0, -4.0)]
    found = [task.prediction(doc, [LogLikelihood(a, True), LogLikelihood(b, False)] * 2)["metrics"] for a, b in sums]
    errors = task.standard_errors(found, [doc] * 4)
    assert errors["acc_raw"] == pytest.approx(math.sqrt(0.75 * 0.25 * 4 / 3 / 4))
    assert errors["primary_score"] == errors["acc_per_char"]
    assert math.isnan(task.standard_errors(found[:1], [doc])["acc_raw"])


def test_per_token_divides_by_the_tokens_counted() -> None:
    task = get_tasks(["boolq"])[0]
    doc = {"continuations": [" yes", " no"], "gold": 0, "contexts": ["x", "x"], "group": ""}
    found = task.prediction(doc, [LogLikelihood(-4.0, False, 4, 9), LogLikelihood(-3.0, False, 1, 6)])
    assert found["metrics"]["acc_raw"] == 0 and found["metrics"]["acc_per_token"] == 1
    assert found["model_output"][0]["num_tokens_all"] == 9


def test_plain_tuples_of_other_engines_count_one_token() -> None:
    task = get_tasks(["boolq"])[0]
    doc = {"continuations": [" yes", " no"], "gold": 0, "contexts": ["x", "x"], "group": ""}
    found = task.prediction(doc, [(-4.0, False), (-3.0, True)])["metrics"]
    assert found["acc_per_token"] == found["acc_raw"] == 0


@pytest.mark.parametrize("text, number", [("a 1,234.5!", "1234.5"), ("-7", "7"), ("none", "none"), ("", "")])
def test_last_number(text: str, number: str) -> None:
    assert m.gsm8k_number(text) == number


def test_averages_leave_out_what_is_absent() -> None:
    assert m.mean([1, None, 2]) == 1.5
    assert math.isnan(m.mean([None]))


@pytest.mark.parametrize(("text", "value"), [
    ("so -5", "-5"), ("it is 5.0", "5"), ("3-5", "5"), ("10 - 5", "5"), ("= −7", "-7"), ("-$1,234.50.", "-1234.5"),
    ("$ 12", "12"), (".5", "0.5"), ("2e3 J", "2000"), ("12.5%", "12.5"), ("x2-3", "3"), ("(-4)", "-4"), ("none", None),
])
def test_value_of_the_last_number(text: str, value: str | None) -> None:
    assert m.last_number(text) == (None if value is None else Decimal(value))


def test_numbers_of_own_tasks_compare_by_value_and_those_of_gsm8k_as_published() -> None:
    doc = {"references": ["-5"]}
    assert [score_number(text, doc)["exact_match"] for text in ("-5.0", "5", "no number")] == [1, 0, 0]
    published = {"references": [m.gsm8k_number("-5")]}
    assert [score_gsm8k(text, published)["exact_match"] for text in ("-5", "5", "5.0")] == [1, 1, 0]


def test_an_empty_reference_of_an_own_task_is_met_by_an_empty_answer_only() -> None:
    assert m.squad_metrics("anything", [""])["recall"] == 1  # as published
    assert set(m.answer_metrics("anything", ["", "the"]).values()) == {0}
    assert set(m.answer_metrics(" ", [""]).values()) == {1}
    assert m.answer_metrics("a cat", ["", "cat"]) == {"exact_match": True, "f1": 1.0, "recall": 1.0}


def test_choices_without_tokens_come_last() -> None:
    task = get_tasks(["arc_easy"])[0]
    doc = {"continuations": [" a", ""], "gold": 1, "contexts": ["x", "x"], "group": ""}
    output = [LogLikelihood(-9.0, False, 2, 3), LogLikelihood(0.0, True, 0, 1)] * 2
    doc["continuations"][1] = " "  # one character, no token
    found = task.prediction(doc, output)["metrics"]
    assert {found[f"predicted_index_{name}"] for name in ("raw", "per_char", "per_token", "per_byte", "uncond")} == {0}
    assert found["acc_raw"] == 0 and found["sum_logits_corr"] is None and found["softloss_corr"] == 0
