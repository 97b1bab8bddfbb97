"""Tasks from a user's YAML file: the guide's examples, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emo_select.cli.app import app
from emo_select.errors import TaskError, UnknownNameError
from emo_select.tasks import Generation, get_tasks
from emo_select.tasks.base import Task
from emo_select.tasks.userfile import render

GUIDE = Path(__file__).parents[2] / "docs/tasks.md"
ROW = {"q": "Two plus two?", "options": ["3", "4"], "right": 1}
CHOICE = {"name": "mine", "kind": "multiple_choice", "data": {"test": "rows.jsonl"}, "text": "{{ q }}\nAnswer:",
          "choices": "options", "gold": "{{ right }}"}


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    """The files of the guide."""
    found = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(found) == 5
    for name, text in found:
        (tmp_path / name).write_text(text)
    return tmp_path


def load(folder: Path, definition: dict[str, object], rows: list[dict[str, object]] | bytes) -> Task:
    lines = rows if isinstance(rows, bytes) else "\n".join(map(json.dumps, rows)).encode()
    (folder / "rows.jsonl").write_bytes(lines)
    (folder / "mine.yaml").write_text(json.dumps(definition))  # JSON is YAML
    return get_tasks([str(folder / "mine.yaml")])[0]


def test_multiple_choice_of_the_guide(guide: Path) -> None:
    task = get_tasks([str(guide / "birds.yaml")])[0]
    sizes = [len(task.docs(split)) for split in ("train", "validation", "test")]
    assert sizes == [2, 1, 1]
    names = [doc["native_id"] for split in ("train", "validation", "test") for doc in task.docs(split)]
    assert sorted(names) == ["b1", "b2", "b3", "b4"]
    (example,) = task.examples("test")
    shot = task.docs("train")[0]
    assert example.prompt.startswith(f"Questions about birds.\n\n{shot['contexts'][0]}")
    assert example.prompt.endswith("\nAnswer:") and example.answer.startswith(" ")
    asked = task.requests(task.docs("test")[0])
    assert len(asked) == 2 * len(task.docs("test")[0]["continuations"])
    assert (task.primary_metric, task.delimiter, task.alias) == ("acc_per_char", "Answer:", "birds:rc_test")


def test_generation_of_the_guide(guide: Path) -> None:
    task = get_tasks([str(guide / "sums.yaml")])[0]
    shots = "Question: 2 plus 3?\nAnswer: 5\n\nQuestion: 4 plus 4?\nAnswer: 8\n\n"
    assert [example.text for example in task.examples("test")] == [
        f"{shots}Question: 3 plus 3?\nAnswer: 6", f"{shots}Question: 5 plus 4?\nAnswer: 9"
    ]
    scores = [task.prediction(task.docs("test")[0], [Generation(text)])["metrics"] for text in (" six\nand", " five")]
    assert [score["exact_match"] for score in scores] == [1.0, 0.0]
    assert task.aggregate(scores, task.docs("test"))["primary_score"] == 0.5


def test_found_again_by_name_and_fingerprint_follows_the_data(guide: Path) -> None:
    task = get_tasks([str(guide / "sums.yaml")])[0]
    assert get_tasks(["sums"])[0].fingerprint() == task.fingerprint()
    with (guide / "sums_test.csv").open("a") as rows:
        rows.write("1,1,2,two\n")
    assert get_tasks(["sums"])[0].fingerprint() != task.fingerprint()


def test_found_by_name_beside_the_data_in_another_process(guide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emo_select.tasks.registry._user_files", {})
    assert get_tasks(["sums"], guide)[0].name == "sums"
    monkeypatch.setattr("emo_select.tasks.registry._user_files", {})
    monkeypatch.chdir(guide)
    assert get_tasks(["birds"])[0].name == "birds"


def test_check_command_shows_two_prompts(guide: Path) -> None:
    result = CliRunner().invoke(app, ["tasks", "check", str(guide / "sums.yaml")])
    assert result.exit_code == 0, result.output
    assert "test: 2 documents" in result.stdout
    assert "Question: 5 plus 4?\nAnswer:▸ 9" in result.stdout
    assert result.stdout.count("--- prompt") == 2


def test_check_with_a_model_counts_long_prompts_and_answers_without_tokens(tmp_path: Path, shared_dir: Path) -> None:
    load(tmp_path, CHOICE, [ROW, {**ROW, "q": "long " * 3000}, {**ROW, "options": ["", "4"]}])
    model = shared_dir / "golden/tasks/e2e/random/model"
    result = CliRunner().invoke(app, ["tasks", "check", str(tmp_path / "mine.yaml"), "--model", str(model)])
    assert result.exit_code == 0, result.output
    assert "longer than 2048 tokens: 1 (number 2)" in result.stdout


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metrik": "acc_raw"}, "did you mean 'metric'"),
        ({"kind": "choice"}, "kind: "),
        ({"gold": None}, "needs the key 'gold'"),
        ({"answer": "x"}, "belong to generation tasks"),
        ({"data": "rows.jsonl"}, "needs 'splits'"),
        ({"data": "rows.jsonl", "splits": {"train": 0.5, "test": 0.4}}, "must add up to 1"),
        ({"data": {"train": "rows.jsonl"}}, "needs a test file"),
        ({"text": "{{ q "}, "the template"),
        ({"text": "{{ question }}"}, r"rows.jsonl, row 1: there is no field 'question' \(it has q, options, right\)"),
        ({"choices": "q"}, "the field 'q' is not a list"),
        ({"choices": []}, "there are no choices"),
        ({"gold": "9"}, "row 1: the gold choice is number 10, counted from 1, of 2 choices"),
        ({"gold": "-1"}, "the gold choice is number 0"),
        ({"gold": "four", "gold_is": "text"}, "none of the choices"),
        ({"gold": "{{ q }}", "gold_is": "letter"}, "not a letter"),
        ({"gold": "{{ q }}"}, "not a whole number"),
        ({"shots": 2}, "a train split is needed"),
        ({"metric": "f1"}, "'f1' is not among acc_raw"),
        ({"unconditional": False, "metric": "acc_uncond"}, "not among"),
        ({"name": "a/b"}, "name: "),
        ({"name": "mmlu"}, "taken by a task of emo-select"),
        ({"name": "arc_easy"}, "taken by a task of emo-select"),
        ({"data": {"test": "absent.jsonl"}}, "there is no file"),
        ({"text": "{{ ''.__class__.__mro__ }}"}, "cannot be filled"),
        ({"text": "{{ 1 / 0 }}"}, "cannot be filled"),
    ],
)
def test_refused_definitions(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message) as caught:
        load(tmp_path, {**CHOICE, **change}, [ROW])
    assert type(caught.value).__name__ in ("TaskError", "DataMissingError")


@pytest.mark.parametrize(
    "rows, message",
    [
        ([ROW, {**ROW, "q": None}], "row 2: the field 'q' is null"),
        ([ROW, ROW, {"q": "x", "right": 0}], "row 3: there is no field 'options'"),
        ([ROW, {**ROW, "right": 2}], "row 2: the gold choice is number 3"),
        (b'{"q": "\xff"}', "line 1 is not UTF-8"),
        (b'{"q": 1}\n{"q": ', "line 2 is not valid JSON"),
        (b"[1]", "line 1 is not a JSON object"),
        ([], "has no test rows"),
    ],
)
def test_refused_rows(rows: list[dict[str, object]] | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=message):
        load(tmp_path, CHOICE, rows)


def test_odd_rows_are_kept_and_counted(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "options": ["4", "4"]}, {**ROW, "options": ["", "4"]}]
    task = load(tmp_path, CHOICE, rows)
    docs = task.docs("test")
    assert len(docs) == 3
    assert task.remarks(docs) == {"duplicate_choices": [1], "empty_choices": [2]}
    assert "duplicate choices: 1 (number 2)" in (
        CliRunner().invoke(app, ["tasks", "check", str(tmp_path / "mine.yaml")]).stdout
    )


def test_a_task_without_train_rows_says_so(tmp_path: Path) -> None:
    task = load(tmp_path, CHOICE, [ROW])
    for split in ("train", "validation"):
        with pytest.raises(TaskError, match="--calibration FILE"):
            task.examples(split)


@pytest.mark.parametrize("form", ["number", "letter", "text"])
def test_forms_of_gold(form: str, tmp_path: Path) -> None:
    gold = {"number": "2", "letter": "b", "text": "4"}[form]
    task = load(tmp_path, {**CHOICE, "gold": gold, "gold_is": form}, [ROW])
    assert task.docs("test")[0]["gold"] == 1


def test_not_yaml_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(TaskError, match="not valid YAML"):
        get_tasks([str(tmp_path / "a.yaml")])
    (tmp_path / "a.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(TaskError, match="'name' is given twice"):
        get_tasks([str(tmp_path / "a.yaml")])
    (tmp_path / "a.yaml").write_bytes(b"name: \xff")
    with pytest.raises(TaskError, match="not UTF-8"):
        get_tasks([str(tmp_path / "a.yaml")])
    with pytest.raises(TaskError, match="does not exist"):
        get_tasks([str(tmp_path / "b.yaml")])


def test_templates_keep_final_newlines() -> None:
    assert render("{{ a }}\n", {"a": "<b>"}) == "<b>\n"


def test_unknown_names_have_near_matches() -> None:
    with pytest.raises(UnknownNameError, match="'arc_easy'"):
        get_tasks(["arc_esy"])


def test_rows_that_are_shots_are_not_trained_on_unless_kept(tmp_path: Path) -> None:
    rows = [{"q": f"Question {number}", "options": ["a", "b"], "right": 0} for number in range(4)]
    definition = {**CHOICE, "data": {"train": "rows.jsonl", "test": "rows.jsonl"}, "shots": 2}
    task = load(tmp_path, definition, rows)
    assert [example.prompt.count("Question 2") for example in task.examples("train")] == [1, 0]
    assert len(task.examples("validation")) == 2 and len(task.examples("train", num_shots=0)) == 4
    assert len(task.examples("test")) == 4 and len(task.examples("train", num_shots=1)) == 3
    kept = load(tmp_path, {**definition, "shot_rows": "keep"}, rows)
    assert len(kept.examples("train")) == 4 and len(kept.examples("train", leave_out_shots=True)) == 2
    assert all("Question 0\nAnswer: a" in example.prompt for example in kept.examples("train"))
    with pytest.raises(TaskError, match="Every train row of task mine is a few-shot example"):
        load(tmp_path, definition, rows[:2]).examples("train")


def test_a_number_without_a_number_is_refused(tmp_path: Path) -> None:
    definition = {"name": "mine", "kind": "generation", "data": {"test": "rows.jsonl"}, "text": "{{ q }}",
                  "answer": "{{ a }}", "score": "number"}
    with pytest.raises(TaskError, match="the reference 'many' has no number"):
        load(tmp_path, definition, [{"q": "How many?", "a": "many"}])
