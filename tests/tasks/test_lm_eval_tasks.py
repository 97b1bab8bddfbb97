"""lm-eval's own tasks by name, on rows of our own in its data sets' schema."""

import json
from pathlib import Path
from typing import Any

import pytest

from emo_select.errors import DataMissingError, TaskError, UnknownNameError
from emo_select.tasks import Generation, LogLikelihood, Task, get_tasks

pytest.importorskip("lm_eval")

LETTERS = "ABC"


def write(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a few rows in the schemas of ARC-Easy, GSM8K and WinoGrande."""
    folder = tmp_path_factory.mktemp("data")

    def arc(split: str, count: int) -> list[dict[str, Any]]:
        return [{"id": f"{split}{n}", "question": f"Which {split} number follows {n}?", "answerKey": LETTERS[n % 3],
                 "choices": {"text": [f"{n}a", f"{n} and b", f"{n}c"], "label": list(LETTERS)}} for n in range(count)]

    def gsm(count: int) -> list[dict[str, Any]]:
        return [{"question": f"Add 1 to {n}.", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
                for n in range(count)]

    gaps = [{"sentence": f"Jo met Kim {n} times and _ waved.", "option1": "Jo", "option2": "Kim", "answer": "2"}
            for n in range(4)]
    write(folder / "allenai/ai2_arc/ARC-Easy", {"train": arc("train", 9), "validation": arc("validation", 4),
                                                "test": arc("test", 5)})
    write(folder / "openai/gsm8k/main", {"train": gsm(8), "test": gsm(3)})
    write(folder / "allenai/winogrande/winogrande_xl", {"train": gaps, "validation": gaps})
    return folder


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMO_SELECT_DATA_DIR", raising=False)


def load(name: str, data: Path) -> Task:
    (task,) = get_tasks([f"lm-eval:{name}"], data)
    return task


def stock_requests(task: Any, shots: int) -> list[list[Any]]:
    """What lm-eval's evaluator would ask: its own request building with the seed of its command."""
    inner = task.inner
    inner.set_config("num_fewshot", shots)
    inner.set_fewshot_seed(1234)
    inner.build_all_requests(rank=0, world_size=1)
    asked: dict[int, list[Any]] = {}
    for instance in inner.instances:
        asked.setdefault(instance.doc_id, []).append(instance.args)
    return [asked[number] for number in sorted(asked)]


@pytest.mark.parametrize("name, shots", [("arc_easy", 0), ("arc_easy", 3), ("gsm8k", 2), ("winogrande", 1)])
def test_asks_what_lm_eval_asks(name: str, shots: int, data: Path) -> None:
    task = load(name, data)
    ours = [[(one.context, one.continuation) for one in task.requests(doc, shots)] for doc in task.docs("test")]
    backwards = [task.requests(doc, shots) for doc in reversed(task.docs("test"))][::-1]
    assert [[(one.context, one.continuation) for one in asked] for asked in backwards] == ours
    for asked, stock in zip(ours, stock_requests(task, shots), strict=True):
        assert [context for context, _ in asked] == [arguments[0] for arguments in stock]
        if task.kind == "multiple_choice":
            assert [continuation for _, continuation in asked] == [arguments[1] for arguments in stock]


def test_splits_texts_and_metrics_of_multiple_choice(data: Path) -> None:
    task = load("arc_easy", data)
    assert task.available and task.primary_metric == "acc_norm" and task.name == "lm-eval-arc_easy"
    assert [len(task.docs(split)) for split in ("train", "validation", "test")] == [9, 4, 5]
    (example,) = task.examples("validation", limit=1)
    assert example.prompt == "Question: Which validation number follows 0?\nAnswer:" and example.answer == " 0a"
    docs = task.docs("test")[:2]
    found = [task.prediction(doc, [LogLikelihood(-3.0, False, 2), LogLikelihood(-3.5, False), (-9.0, False)])
             for doc in docs]
    assert found[0]["metrics"] == {"acc": 1.0, "acc_norm": 0.0}
    assert found[0]["model_output"][0] == {"sum_logits": -3.0, "is_greedy": False, "num_tokens": 2}
    averages = task.aggregate([one["metrics"] for one in found], docs)
    assert averages == {"acc": 0.5, "acc_norm": 0.5, "primary_score": 0.5}
    assert set(task.standard_errors([one["metrics"] for one in found], docs)) == {"acc", "acc_norm"}


def test_filters_of_generation(data: Path) -> None:
    task = load("gsm8k", data)
    assert task.kind == "generation" and task.generation_options["until"]
    (example,) = task.examples("train", num_shots=0, limit=1)
    assert example.answer.startswith(" 0+1=") and example.answer.endswith("#### 1")
    doc = task.docs("test")[1]
    loose = task.prediction(doc, [Generation("it is 2")])["metrics"]
    strict = task.prediction(doc, [Generation("so\n#### 2")])["metrics"]
    assert sorted(loose.values()) == [0.0, 1.0] and set(strict.values()) == {1.0}
    assert task.aggregate([loose, strict], [doc, doc])["primary_score"] in (0.5, 1.0)


def test_validation_is_not_calibrated_on_where_it_is_evaluated(data: Path) -> None:
    task = load("winogrande", data)  # has no test split, so its validation split is evaluated
    assert [doc["split"] for doc in task.docs("validation")] == ["train"] * 4
    example = task.examples("train", limit=1)[0]
    assert (example.prompt, example.answer) == ("Jo met Kim 0 times and Kim", " waved.")


def test_found_again_by_its_name_in_directories(data: Path) -> None:
    assert get_tasks(["lm-eval-arc_easy"], data)[0].fingerprint() == load("arc_easy", data).fingerprint()


def test_groups_and_what_a_group_changes(data: Path) -> None:
    tasks = get_tasks(["lm-eval:openllm"], data)
    by_name = {task.name: task for task in tasks}
    assert by_name["lm-eval-openllm.arc_challenge"].default_shots == 25
    (again,) = get_tasks(["lm-eval-openllm.arc_challenge"], data)
    assert again.default_shots == 25
    assert len(get_tasks(["lm-eval:mmlu"], data)) == 57


def test_unknown_and_unusable_names(data: Path) -> None:
    with pytest.raises(UnknownNameError, match="'arc_easy'"):
        get_tasks(["lm-eval:arc_esy"], data)
    for name, reason in (("wikitext", "loglikelihood_rolling"), ("humaneval", "executes"), ("squadv2", "a program")):
        with pytest.raises(TaskError, match=reason):
            get_tasks([f"lm-eval:{name}"], data)


def test_missing_data_names_the_command(tmp_path: Path) -> None:
    task = load("arc_easy", tmp_path)
    assert not task.available
    with pytest.raises(DataMissingError, match="emo-select fetch --task lm-eval:arc_easy --to DIR"):
        task.require_data()


def test_a_task_without_train_rows_offers_own_texts(data: Path, tmp_path: Path) -> None:
    rows = [{"question": "q", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 1}] * 3
    write(tmp_path / "cais/mmlu/anatomy", {"dev": rows, "validation": rows, "test": rows})
    task = load("mmlu_anatomy", tmp_path)
    assert len(task.docs("test")) == 3
    with pytest.raises(TaskError, match="--calibration FILE"):
        task.examples("train")
