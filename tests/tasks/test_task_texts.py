"""Text rules of single data sets."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from emo_select.tasks import answers, published
from emo_select.tasks.metrics import cut_at_stop, gsm8k_number


@pytest.fixture(scope="module")
def cases(shared_dir: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((shared_dir / "golden/tasks/metrics/text_cases.json").read_text())
    return found


def test_hellaswag_cleaning(cases: Mapping[str, Any]) -> None:
    for case in cases["hellaswag_clean"]:
        assert answers.clean_hellaswag(case["text"]) == case["expected"]


def test_hellaswag_rows(cases: Mapping[str, Any]) -> None:
    for case in cases["hellaswag_row"]:
        doc = published.read_hellaswag(case["row"])
        assert set(doc["contexts"]) == {case["expected"]["doc_text"]}
        assert doc["continuations"] == case["expected"]["continuations"]
        assert doc["gold"] == case["expected"]["gold"]


def test_gsm8k_answers(cases: Mapping[str, Any]) -> None:
    for case in cases["gsm8k_answer"]:
        assert answers.gsm8k_reasoning(case["row_answer"]) == case["expected"]["calibration_answer"]
        assert answers.gsm8k_final(case["row_answer"]) == case["expected"]["short_answer"]
        assert gsm8k_number(answers.gsm8k_final(case["row_answer"])) == case["expected"]["gold"]


def test_drop_answers(cases: Mapping[str, Any]) -> None:
    for case in cases["drop_answers"]:
        row = {"passage": "p", "question": "q", **case}
        doc = published.read_drop(row)
        assert doc["references"] == case["expected"]["answers"]
        assert doc["answer"] == case["expected"]["calibration_answer"]
        assert f" {doc['shot_answer']}" == case["expected"]["fewshot_target"]


def test_cut_at_the_earliest_stop(cases: Mapping[str, Any]) -> None:
    for case in cases["cut_at_stop"]:
        assert cut_at_stop(case["text"], case["stops"]) == case["expected"]


def test_coqa_turns(cases: Mapping[str, Any]) -> None:
    for case in cases["coqa_turns"]:
        turns = answers.coqa_turns(case["row"])
        for turn, expected in zip(turns, case["expected"], strict=True):
            assert (turn["id"], turn["prompt"]) == (expected["id"], expected["query"])
            assert turn["answers"] == expected["answers"]
            assert published.read_coqa(turn)["answer"] == expected["calibration_answer"]


def test_winogrande_rows(cases: Mapping[str, Any]) -> None:
    task = published.multiple_choice_tasks(None)[-1]
    for case in cases["winogrande_row"]:
        doc, expected = published.read_winogrande(case["row"]), case["expected"]
        assert doc["contexts"] == expected["contexts"]
        assert set(doc["continuations"]) == {expected["continuation"]}
        assert doc["gold"] == expected["gold"]
        assert task.shot(doc) == expected["fewshot_example"]


def test_golds(cases: Mapping[str, Any]) -> None:
    for case in cases["arc_gold"]:
        assert published.letter_index(case["answerKey"]) == case["expected"]
    for case in cases["boolq_gold"]:
        row = {"passage": "", "question": "", "label": case["label"]}
        assert published.read_boolq(row)["gold"] == case["expected"]


def test_headers(shared_dir: Path) -> None:
    from emo_select.tasks.mmlu import CATEGORIES, mmlu_header

    expected = json.loads((shared_dir / "golden/tasks/headers.json").read_text())
    assert expected["S"] == published.SQUAD_HEADER
    assert expected["K"] == published.COQA_HEADER
    assert expected["D"] == published.DROP_HEADER
    subjects = [subject for names in CATEGORIES.values() for subject in names]
    assert {subject: mmlu_header(subject) for subject in subjects} == expected["M"]
